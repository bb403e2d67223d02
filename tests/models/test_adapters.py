"""Adapters against weights `W + (alpha / rank) · B A` that are written out by hand."""

import re
import sys
from typing import Any

import pytest
import torch
from test_policy import rollouts_of
from tiny import WORDS, family_config, make_batch, make_critic, make_policy

from sppo_lightning.batch import Prompt
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy, LoRA
from sppo_lightning.models.adapters import adapters_off, merged_weights
from sppo_lightning.models.policy import AdapterFreePolicy
from sppo_lightning.models.tiny import word_tokenizer

SCALE = 3.0  # alpha / rank
LORA = LoRA(rank=2, alpha=6.0)
PROMPTS = [Prompt(text, "a", "words", i) for i, text in enumerate(["a b", "c", "h g f e d"])]


def policy_of(family: str, lora: LoRA | None, **settings: Any) -> CausalLMPolicy:
    policy = CausalLMPolicy(config=family_config(family, 38), lora=lora, **settings)
    policy.tokenizer = word_tokenizer(WORDS.split())
    torch.manual_seed(3)
    policy.build()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1 and "lora_" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


def move(module: torch.nn.Module) -> None:
    """Adapters as after training: `B` starts at zero."""
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def by_hand(model: Any) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    result = {n.replace(".base_layer", ""): w.clone() for n, w in weights.items() if "lora_" not in n}
    for name, a in weights.items():
        if "lora_A" in name:
            product = SCALE * weights[name.replace("lora_A", "lora_B")] @ a
            result[name.replace(".lora_A.default", "")] += (
                product.T if model.config.model_type == "gpt2" else product
            )
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])  # gpt2 has its weights transposed
def test_log_probs_and_gradients_are_those_of_the_weights_by_hand(family: str, checkpointing: bool):
    policy = policy_of(family, LORA, gradient_checkpointing=checkpointing)
    move(policy)
    plain = policy_of(family, None)
    rollouts = rollouts_of(plain, 1.0)
    assert (policy(rollouts)[0] - plain(rollouts)[0]).abs().max() > 0.1
    plain.model.load_state_dict(by_hand(policy.model))
    ours, expected = policy(rollouts)[0], plain(rollouts)[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    for name, weight in merged_weights(policy.model):
        torch.testing.assert_close(weight, plain.model.state_dict()[name], atol=1e-5, rtol=1e-5)

    ours.sum().backward()
    expected.sum().backward()
    full = dict(plain.named_parameters())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {re.split(r"\.(?=lora_)", name)[1].split(".")[0] for name in trained} == {"lora_A", "lora_B"}
    assert all(p.grad is None for name, p in policy.named_parameters() if name not in trained)
    for name, parameter in trained.items():
        if "lora_B" in name:  # dL/dB = scale · dL/dW Aᵀ
            gradient = full[name.replace(".lora_B.default", "")].grad
            a = trained[name.replace("lora_B", "lora_A")]
            gradient = gradient.T if family == "gpt2" else gradient
            torch.testing.assert_close(parameter.grad, SCALE * gradient @ a.T, atol=1e-3, rtol=1e-3)


def test_the_reference_is_the_policy_with_its_adapters_off():
    policy, plain = make_policy(lora=LORA), make_policy()
    plain.load_state_dict(
        {n.replace(".base_layer", ""): w for n, w in policy.state_dict().items() if "lora" not in n}
    )
    reference = policy.as_reference()
    rollouts = rollouts_of(plain, 0.7)
    expected = plain(rollouts)[0]
    assert torch.equal(policy(rollouts)[0], expected)  # B is zero
    move(policy)
    assert (policy(rollouts)[0] - expected).abs().max() > 0.1
    assert torch.equal(reference(rollouts)[0], expected)
    assert not reference(rollouts)[0].requires_grad
    assert list(reference.parameters()) == []
    assert reference.state_dict() == {}
    assert reference.model is policy.model


def test_adapters_come_back_on_after_an_error():
    policy = make_policy(lora=LORA)
    move(policy)
    before = policy(rollouts_of(policy, 1.0))[0]
    trainable = [p.requires_grad for p in policy.parameters()]
    with pytest.raises(RuntimeError, match="stop"), adapters_off(policy.model), adapters_off(policy.model):
        raise RuntimeError("stop")
    assert torch.equal(policy(rollouts_of(policy, 1.0))[0], before)
    assert [p.requires_grad for p in policy.parameters()] == trainable


def test_responses_come_from_the_adapted_weights_and_from_the_references():
    policy, plain = make_policy(lora=LORA), make_policy()
    plain.load_state_dict(
        {n.replace(".base_layer", ""): w for n, w in policy.state_dict().items() if "lora" not in n}
    )
    move(policy)
    sampled = {}
    for name, source in {"policy": policy, "plain": plain, "reference": policy.as_reference()}.items():
        engine = HFEngine()
        engine.update_weights(source, 0)
        sampled[name] = engine.generate(make_batch(policy, ["1 + 2 =", "a"]), Sampling(max_new_tokens=12))
    assert torch.equal(sampled["reference"].response_ids, sampled["plain"].response_ids)
    assert torch.equal(sampled["reference"].sampled_log_probs, sampled["plain"].sampled_log_probs)
    rollouts = sampled["policy"]
    assert rollouts.response_ids.tolist() != sampled["plain"].response_ids.tolist()
    torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-5, rtol=1e-5)


def test_a_critic_trains_its_adapters_and_its_head():
    critic = make_critic(lora=LORA)
    move(critic)
    plain = make_critic()
    plain.model.load_state_dict(by_hand(critic.model))
    torch.testing.assert_close(critic(PROMPTS), plain(PROMPTS), atol=1e-5, rtol=1e-5)
    critic(PROMPTS).sum().backward()
    plain(PROMPTS).sum().backward()
    torch.testing.assert_close(critic.value_head.weight.grad, plain.value_head.weight.grad, atol=1e-5, rtol=1e-5)
    assert {n.split(".")[-3] for n, p in critic.named_parameters() if p.grad is not None and "lora" in n} == {
        "lora_A",
        "lora_B",
    }
    others = [n for n, p in critic.named_parameters() if p.grad is not None and "lora" not in n]
    assert others == ["model.score.weight"]


def test_dropout_is_of_the_update_alone():
    policy = make_policy(lora=LoRA(rank=2, alpha=6.0, dropout=0.5))
    exact = make_policy(lora=LORA)
    move(policy)
    exact.load_state_dict(policy.state_dict())
    rollouts = rollouts_of(policy, 1.0)
    with torch.no_grad():
        assert torch.equal(policy(rollouts)[0], exact(rollouts)[0])
    assert (policy(rollouts)[0] - exact(rollouts)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["q_proj", "query"], ["q_proj", "lm_head"], "nothing.*"]
)
def test_targets_that_are_no_linear_layers_below_the_head(targets: Any):
    with pytest.raises(
        InputError, match=r"`model\.policy\.lora\.target_modules`=.*Qwen2ForCausalLM below its head"
    ):
        make_policy(lora=LoRA(target_modules=targets))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", None])  # None: peft's for qwen2
def test_targets_by_name_by_expression_and_by_family(targets: Any):
    policy = make_policy(lora=LoRA(target_modules=targets))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in policy.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_what_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"rank": 0, "alpha": 0.0, "dropout": 1.0, "target_modules": []}.items():
        with pytest.raises(InputError, match=rf"`lora\.{name}`="):
            LoRA(**{name: value})
    with pytest.raises(InputError, match=r"`model\.critic\.freeze_backbone`=True"):
        make_critic(lora=LORA, freeze_backbone=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"`model\.policy\.lora` needs peft .*sppo-lightning\[lora\]"):
        make_policy(lora=LORA)
    assert not isinstance(make_policy().as_reference(), AdapterFreePolicy)
