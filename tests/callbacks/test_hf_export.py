"""The folders that a run leaves: loaded as they are, they are what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import FirstWord, data, sppo, stages, trainer_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import HFExport, RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy, LoRA, PromptCritic

TEXTS = ["a b", "c", "h g f e d", "b b b"]
PROMPTS = [Prompt(text, "a", "words", i) for i, text in enumerate(TEXTS)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} h {% endfor %}{% if add_generation_prompt %}a{% endif %}"


def run(folder: Path, **settings: Any) -> SPPOModule:
    """Train two iterations and export to `folder/model`."""
    module = sppo(folder / "tokenizer", learning_rate=settings.pop("learning_rate", 0.02))
    module.configure_model()  # before a fork, so that all processes start from the same weights
    callbacks = [*stages(), HFExport(str(folder / "model"))]
    trainer_of(callbacks, **settings).fit(module, data(validation=(), size=16))
    return module


def same(one: torch.nn.Module, other: torch.nn.Module, atol: float = 0.0) -> None:
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(
            other.state_dict()[name], weight, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_policy_and_critic_come_back_as_they_were_trained(tmp_path: Path):
    module = run(tmp_path)
    again = CausalLMPolicy(str(tmp_path / "model"))
    again.build()
    same(module.policy, again)
    assert again.tokenizer("a h <eos>")["input_ids"] == module.policy.tokenizer("a h <eos>")["input_ids"]
    untrained = sppo(tmp_path / "tokenizer")
    untrained.configure_model()
    with pytest.raises(AssertionError):
        same(untrained.policy, again)
    assert module.critic is not None
    critic = PromptCritic(str(tmp_path / "model/critic"))
    critic.build()
    same(module.critic, critic)
    values = critic(PROMPTS)
    torch.testing.assert_close(values, module.critic(PROMPTS), atol=1e-6, rtol=0)
    assert values.abs().min() > 1e-3  # the head has learned


def test_the_critics_folder_is_a_classifier_of_how_solvable_a_prompt_is(tmp_path: Path):
    critic = run(tmp_path).critic
    assert critic is not None
    folder = str(tmp_path / "model/critic")
    values = critic(PROMPTS).sigmoid()
    for rate in (
        pipeline("text-classification", model=folder, device="cpu", function_to_apply="sigmoid"),
        pipeline("text-classification", model=folder, device="cpu", batch_size=4),  # its own choice, and padding
    ):
        found = rate(TEXTS)
        assert [entry["label"] for entry in found] == ["solvable"] * 4
        torch.testing.assert_close(torch.tensor([entry["score"] for entry in found]), values, atol=1e-5, rtol=0)


def test_a_classifier_of_chats_reads_what_the_template_makes_of_them(tmp_path: Path):
    module = sppo(tmp_path / "tokenizer")
    assert module.critic is not None
    module.critic.tokenizer.chat_template = TEMPLATE
    trainer_of([*stages(), HFExport(str(tmp_path / "model"))]).fit(module, data(validation=(), size=16))
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    value = module.critic([Prompt("what the policy reads", "a", "words", 0, messages=tuple(turns))]).sigmoid()
    rate: Any = pipeline("text-classification", model=str(tmp_path / "model/critic"), device="cpu")
    text = rate.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "a b h c h a"
    (found,) = rate(text, add_special_tokens=False)
    assert found["score"] == pytest.approx(value.item(), abs=1e-5)


def test_transformers_makes_the_same_logits_and_speaks_the_same_template(tmp_path: Path):
    module = sppo(tmp_path / "tokenizer")
    module.policy.tokenizer.chat_template = TEMPLATE
    trainer_of([*stages(), HFExport(str(tmp_path / "model"))]).fit(module, data(validation=(), size=16))
    assert module.critic is not None
    ids = torch.tensor([[3, 4, 5, 6]])
    for auto, model, folder in (
        (AutoModelForCausalLM, module.policy.model, tmp_path / "model"),
        (AutoModelForSequenceClassification, module.critic.model, tmp_path / "model/critic"),
    ):
        assert torch.equal(auto.from_pretrained(folder)(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "a b h a"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(0.6, 4, top_p=0.9, top_k=3), (True, 0.6, 0.9, 3, 0.0)),
        (Sampling(1.0, 4), (True, 1.0, 1.0, 0, 0.0)),
        (Sampling(0.0, 4), (False, None, None, None, None)),
    ],
)
def test_who_loads_the_policy_samples_as_the_validation_did(tmp_path: Path, sampling: Sampling, expected: Any):
    module = sppo(tmp_path / "tokenizer")
    generation = RolloutGeneration(Sampling(max_new_tokens=2), validation=sampling)
    callbacks = [generation, FirstWord(), HFExport(str(tmp_path / "model"))]
    trainer_of(callbacks).fit(module, data(validation=(), size=8))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (found.do_sample, found.temperature, found.top_p, found.top_k, found.min_p) == expected
    assert (found.eos_token_id, found.pad_token_id) == (1, 0)


def test_a_way_with_adapters_that_is_unknown():
    with pytest.raises(InputError, match=r"`HFExport.adapters`=merge is unknown; use both or merged or alone\."):
        HFExport("model", adapters="merge")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_two_processes_leave_what_one_leaves(tmp_path: Path):
    one = run(tmp_path / "one", learning_rate=1e-3)
    run(tmp_path / "two", learning_rate=1e-3, devices=2, strategy="ddp_fork")
    policy, critic = CausalLMPolicy(str(tmp_path / "two/model")), PromptCritic(str(tmp_path / "two/model/critic"))
    assert one.critic is not None
    for trained, loaded in ((one.policy, policy), (one.critic, critic)):
        loaded.build()
        same(trained, loaded, atol=1e-5)
    assert critic(PROMPTS).abs().min() > 1e-4


def test_adapters_leave_whole_models_and_folders_of_their_own(tmp_path: Path):
    module = sppo(tmp_path / "tokenizer", lora=LoRA(rank=2))
    module.configure_model()
    policy, critic = module.policy.model, module.critic.model  # type: ignore[union-attr]
    names = {name: name.replace(".base_layer", "") for name in module.state_dict() if "lora" not in name}
    base = {plain: module.state_dict()[name].clone() for name, plain in names.items()}
    trainer_of([*stages()]).fit(module, data(validation=(), size=16))
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    ids = torch.tensor([[3, 4, 5, 6]])
    logits, values = policy(ids).logits, critic(ids).logits

    HFExport(str(tmp_path / "model")).on_fit_end(module.trainer, module)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == trainable
    assert torch.equal(policy(ids).logits, logits)
    for auto, expected, owner, folder in (
        (AutoModelForCausalLM, logits, "policy", tmp_path / "model"),
        (AutoModelForSequenceClassification, values, "critic", tmp_path / "model/critic"),
    ):
        whole = auto.from_pretrained(folder)
        torch.testing.assert_close(whole(ids).logits, expected, atol=1e-5, rtol=0)
        whole.load_state_dict({n.split(".", 2)[2]: w for n, w in base.items() if n.startswith(owner)})
        assert (whole(ids).logits - expected).abs().max() > 1e-2
        adapted = PeftModel.from_pretrained(whole, str(folder / "adapter"))
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
