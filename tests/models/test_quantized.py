"""Base weights in 4 bits: read as they are, learned beside, left out of checkpoints, exported as plain weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import Parity
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_policy import rollouts_of
from tiny import CHAIN_WORDS, WORDS, make_batch, make_trainer
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import HFExport, RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy, LoRA, PromptCritic, TinyPolicy
from sppo_lightning.models.adapters import merged_weights
from sppo_lightning.models.sharding import shard
from sppo_lightning.optim import GroupOptimizer

QLORA = LoRA(rank=2, alpha=6.0, load_in_4bit=True)
# of NF4: half the widest gap between two of its 16 levels, in units of the largest of 64 weights
WIDEST = (1.0 - 0.6961928) / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("base"), WORDS)


@pytest.fixture(scope="module")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("chain"), CHAIN_WORDS)


def saved(path: Path, words: str) -> str:
    """A model of two layers as a folder; on CPUs bitsandbytes misreads widths that are no multiple of 64."""
    torch.manual_seed(0)
    policy = TinyPolicy(words, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128)
    policy.build()
    policy.model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    return str(path)


def built(folder: str, lora: LoRA | None = QLORA) -> CausalLMPolicy:
    policy = CausalLMPolicy(folder, lora=lora)
    torch.manual_seed(1)
    policy.build()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # as after training: it starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def test_weights_are_the_folders_rounded_to_16_levels(folder: str):
    policy = CausalLMPolicy(folder, lora=QLORA)
    policy.build()  # B is zero
    plain = AutoModelForCausalLM.from_pretrained(folder)
    rounded = 0
    for name, weight in merged_weights(policy.model):
        original = plain.state_dict()[name]
        if "_proj.weight" not in name:
            assert torch.equal(weight, original)
            continue
        rounded += 1
        blocks, originals = weight.reshape(-1, 64), original.reshape(-1, 64)
        bound = originals.abs().amax(1, keepdim=True)
        assert 0 < ((blocks - originals).abs() / bound).max() < WIDEST + 0.02  # whose own scale is rounded too
        assert all(len(block.unique()) <= 16 for block in blocks)
    assert rounded == 14


def test_log_probs_and_gradients_are_those_of_the_merged_weights(folder: str):
    policy, plain = built(folder), CausalLMPolicy(folder)
    plain.build()
    rollouts = rollouts_of(plain, 0.7)
    before = plain(rollouts)[0]
    plain.model.load_state_dict(dict(merged_weights(policy.model)))
    ours, expected = policy(rollouts)[0], plain(rollouts)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 0.05
    ours.sum().backward()
    expected.sum().backward()
    full = {name: p.grad for name, p in plain.named_parameters()}
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    for name, parameter in trained.items():
        if "lora_B" in name:  # dL/dB = scale · dL/dW Aᵀ
            a, gradient = trained[name.replace("lora_B", "lora_A")], full[name.replace(".lora_B.default", "")]
            assert gradient is not None
            torch.testing.assert_close(parameter.grad, 3.0 * gradient @ a.T, atol=1e-3, rtol=1e-3)


def test_checkpoints_leave_out_what_does_not_move(folder: str):
    policy = built(folder)
    kept = policy.state_dict()
    assert not [name for name in kept if "_proj.base_layer.weight" in name]
    assert "model.model.embed_tokens.weight" in kept
    again = CausalLMPolicy(folder, lora=QLORA)
    again.build()
    rollouts = rollouts_of(policy, 0.7)
    assert not torch.equal(again(rollouts)[0], policy(rollouts)[0])
    again.load_state_dict(kept)
    assert torch.equal(again(rollouts)[0], policy(rollouts)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({name: weight for name, weight in kept.items() if "embed" not in name})


def run(folder: str, steps: int, *callbacks: Any, prefetch: int = 0, ckpt_path: str | None = None) -> SPPOModule:
    seed_everything(5, verbose=False)
    rate = GroupOptimizer(lr=1e-2)
    module = SPPOModule(
        CausalLMPolicy(folder, lora=QLORA),
        PromptCritic(folder, lora=QLORA),
        policy_optimizer=rate,
        critic_optimizer=rate,
        kl_coef=0.1,  # to the policy with its adapters off
    )
    generation = RolloutGeneration(Sampling(max_new_tokens=8), prefetch=prefetch)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8)
    settings: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(generation, Parity(), *callbacks, enable_checkpointing=saves, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_ends_with_the_same_bits_and_leaves_plain_models(tmp_path: Path, chain_folder: str):
    whole = run(chain_folder, 4, HFExport(str(tmp_path / "model")))
    run(chain_folder, 2, ModelCheckpoint(tmp_path, "cut", every_n_train_steps=2))
    resumed = run(chain_folder, 4, ckpt_path=str(tmp_path / "cut.ckpt"))
    expected, found = whole.state_dict(), resumed.state_dict()
    assert {name.split(".")[0] for name in expected} == {"policy", "critic"}
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    rollouts, prompts = rollouts_of_words(whole.policy), [Prompt("1 +1 =", "2", "sums", 0)]
    exported = CausalLMPolicy(str(tmp_path / "model"))
    exported.build()
    torch.testing.assert_close(exported(rollouts)[0], whole.policy(rollouts)[0], atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.to_dict()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model/critic")
    ids = torch.tensor([whole.critic.encode(prompts)[0]])
    torch.testing.assert_close(classifier(ids).logits[0], whole.critic(prompts), atol=1e-5, rtol=1e-5)


def rollouts_of_words(policy: Any) -> Any:
    batch, ids = make_batch(policy, ["1 +1 =", "5 +2 ="]), [[4, 5, 6], [7, 8]]
    settings: dict[str, Any] = {"policy": policy, "temperature": 1.0, "versions": [0, 0]}
    return pack_rollouts(batch, [0, 1], ids, [[0.0] * 3, [0.0] * 2], ["stop", "stop"], **settings)


@pytest.mark.slow  # the process that samples takes seconds to start
@pytest.mark.filterwarnings("ignore")
def test_another_process_samples_from_plain_weights(chain_folder: str):
    module = run(chain_folder, 3, prefetch=1)
    assert module.trainer.global_step == 3
    assert module.trainer.callback_metrics["sampler/logprob_gap"] < 1e-4


def test_what_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, folder: str):
    with pytest.raises(InputError, match=r"`trainer\.strategy` shards the weights, which `lora\.load_in_4bit`"):
        shard(built(folder), DeviceMesh.__new__(DeviceMesh))
    with pytest.raises(InputError, match=r"`model\.policy\.lora\.load_in_4bit`=True needs `pretrained`, not"):
        TinyPolicy(WORDS, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, lora=QLORA).build()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"needs bitsandbytes .*sppo-lightning\[quantized\]"):
        CausalLMPolicy(folder, lora=QLORA).build()
