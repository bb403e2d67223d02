"""The critic: what it reads, what it starts with, and that a prompt's value depends on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import CASES, FAST, fit
from tiny import WORDS, FamilyPolicy, TinyCritic, family_config, make_critic, make_policy
from tokenizers.processors import TemplateProcessing

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.models import PromptCritic
from sppo_lightning.models.tiny import word_tokenizer

TEXTS = ["1 + 2 =", "9 - 4 = ; a b c", "2", "a + b - c", "7 - 7 = 0 ; 1 +"]
PROMPTS = [Prompt(text, "", "sums", i) for i, text in enumerate(TEXTS)]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} ; {% endfor %}{% if add_generation_prompt %}a{% endif %}"


class FamilyCritic(PromptCritic):
    tokenizer = word_tokenizer(WORDS.split())


def test_the_value_is_the_classifiers_at_the_last_prompt_token():
    critic = make_critic()
    values = critic(PROMPTS)
    for text, value in zip(TEXTS, values, strict=True):
        ids = torch.tensor([critic.tokenizer(text)["input_ids"]])
        hidden = critic.model.model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(value, hidden @ critic.value_head.weight[0], atol=1e-5, rtol=1e-5)
    assert values.std() > 0.1


def test_the_value_does_not_depend_on_the_batch_or_the_padding():
    critic = make_critic()
    values = critic(PROMPTS)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(critic([PROMPTS[i] for i in order]), values[order], atol=1e-5, rtol=1e-5)
    long = Prompt("1 + " * 60, "", "sums", 9)
    torch.testing.assert_close(critic([long, *PROMPTS])[1:], values, atol=1e-5, rtol=1e-5)
    for prompt, value in zip(PROMPTS, values, strict=True):
        torch.testing.assert_close(critic([prompt])[0], value, atol=1e-5, rtol=1e-5)


def test_a_padding_token_inside_a_prompt_is_read_like_any_other():
    critic = make_critic()
    padded = [Prompt("1 <pad>", "", "sums", 0), Prompt("1 <pad> <pad>", "", "sums", 1), Prompt("1", "", "sums", 2)]
    values = critic(padded)
    assert len({round(float(v), 4) for v in values}) == 3
    for prompt, value in zip(padded, values, strict=True):
        torch.testing.assert_close(critic([prompt])[0], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "mistral", "gemma2", "granite"])
def test_every_family_starts_at_one_half_and_learns(family: str):
    critic = FamilyCritic(config=family_config(family, len(FamilyCritic.tokenizer)))
    critic.build()
    assert critic(PROMPTS).sigmoid().tolist() == [0.5] * 5
    targets = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(critic(PROMPTS), targets).backward()
        optimizer.step()
    torch.testing.assert_close(critic(PROMPTS).sigmoid(), targets, atol=0.2, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "num_hidden_layers": 1},  # takes its value from the first token
        family_config("llama", 38) | {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    ],
    ids=["first token", "looks ahead"],
)
def test_a_model_that_is_not_causal(config: dict[str, Any]):
    with pytest.raises(InputError) as raised:
        FamilyCritic(config=config).build()
    name = {"bert": "Bert", "gemma3_text": "Gemma3Text"}[config["model_type"]]
    assert str(raised.value).startswith("`model.critic`={")
    assert str(raised.value).endswith(
        f"}}: {name}ForSequenceClassification does not take its value from the last token it has read alone, so it is "
        "no causal model; use one, such as Qwen/Qwen2.5-0.5B."
    )


def test_a_model_that_reads_in_pairs():
    config = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    with pytest.raises(InputError, match="cannot read text alone as a causal model does"):
        FamilyCritic(config=config).build()


def test_the_critic_reads_with_its_own_tokenizer_and_chat_template():
    critic = make_critic()  # its vocabulary is the policy's backwards
    assert critic.encode(PROMPTS[:1]) == [critic.tokenizer("1 + 2 =")["input_ids"]]
    turns = ({"role": "user", "content": "1 + 2"},)
    chat = Prompt("<template of the policy>", "", "sums", 0, messages=turns)
    assert critic.encode([chat]) == [critic.tokenizer("<template of the policy>")["input_ids"]]  # has no template
    critic = make_critic()
    critic.tokenizer.chat_template = TEMPLATE
    assert critic.encode([chat]) == [critic.tokenizer("u 1 + 2 ; a")["input_ids"]]
    assert critic.encode(PROMPTS[:1]) == [critic.tokenizer("1 + 2 =")["input_ids"]]


def test_plain_text_begins_with_the_tokenizers_own_first_token():
    critic = make_critic()
    critic.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="; $A", special_tokens=[(";", 5)])
    plain = critic.tokenizer("1 + 2 =", add_special_tokens=False)["input_ids"]
    assert critic.encode(PROMPTS[:1]) == [[5, *plain]]
    critic.tokenizer.chat_template = TEMPLATE
    chat = Prompt("", "", "sums", 0, messages=({"role": "user", "content": "1"},))
    assert critic.encode([chat]) == [critic.tokenizer("u 1 ; a", add_special_tokens=False)["input_ids"]]


def test_a_chat_template_that_refuses_the_messages():
    critic = make_critic()
    critic.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError) as raised:
        critic([Prompt("", "", "sums", 7, messages=({"role": "system", "content": "add"},))])
    assert str(raised.value) == (
        "The chat template of `model.critic` refuses the messages of row 7 of 'sums' (System role not supported); use "
        "a critic that takes them, or prompts without a system message."
    )


def test_a_long_prompt_loses_its_beginning_and_an_empty_one_is_still_read():
    critic = make_critic(max_prompt_tokens=3)
    long, empty = Prompt("1 2 3 4 5", "", "sums", 0), Prompt("", "", "sums", 1)
    assert critic.encode([long, empty]) == [critic.tokenizer("3 4 5")["input_ids"], [critic.tokenizer.eos_token_id]]
    torch.testing.assert_close(critic([long])[0], critic([Prompt("3 4 5", "", "sums", 2)])[0])
    assert torch.isfinite(critic([empty])).all()


def test_gradient_checkpointing_changes_no_number():
    plain, critic = make_critic(), make_critic(gradient_checkpointing=True)
    calls: list[int] = []
    critic.model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    for each in (plain, critic):
        each(PROMPTS).sum().backward()
    assert len(calls) == 2
    for one, other in zip(plain.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-6)


def test_token_ids_are_kept_and_no_more_of_them_than_may_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sppo_lightning.models.critic.CACHED_PROMPTS", 3)
    critic = make_critic()
    first = critic.encode(PROMPTS)
    assert first == [critic.tokenizer(text)["input_ids"] for text in TEXTS]
    assert [text for text, _ in critic._token_ids] == TEXTS[2:]
    again = critic.encode([PROMPTS[2], PROMPTS[0], PROMPTS[4]])  # 3 was asked for the longest ago
    assert again == [first[2], first[0], first[4]]
    assert (again[0] is first[2], again[1] is first[0], again[2] is first[4]) == (True, False, True)
    assert [text for text, _ in critic._token_ids] == [TEXTS[2], TEXTS[0], TEXTS[4]]


def test_what_is_kept_belongs_to_what_is_read():
    critic = make_critic()
    critic.tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}, {"role": "bot", "content": "1"}]
    prompts = [Prompt("same", "", "sums", 0, messages=(turn,)) for turn in turns]
    expected = [critic.tokenizer(text)["input_ids"] for text in ("u 1 ; a", "u 2 ; a", "b 1 ; a")]
    assert critic.encode(prompts) == expected
    assert critic.encode(prompts[::-1]) == expected[::-1]


def test_an_iteration_reads_each_prompt_once():
    read: list[str] = []

    class Counts(TinyCritic):
        def _tokenize(self, prompt: Prompt) -> list[int]:
            read.append(prompt.text)
            return super()._tokenize(prompt)

    module = SPPOModule(make_policy(), Counts(), mini_batch_size=4, **FAST)
    fit(module, CASES, iterations=2)
    assert sorted(read) == sorted(CASES)


def saved(critic: PromptCritic, folder: Path) -> str:
    critic.model.save_pretrained(folder)
    critic.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_critics_folder_keeps_its_value_head(tmp_path: Path):
    critic = make_critic()
    loaded = PromptCritic(saved(critic, tmp_path))
    loaded.build()
    assert loaded.encode(PROMPTS) == critic.encode(PROMPTS)
    values = loaded(PROMPTS)
    torch.testing.assert_close(values, critic(PROMPTS), atol=1e-6, rtol=0)
    assert values.std() > 0.1


def test_a_policys_folder_gets_a_value_head_of_zeros(tmp_path: Path):
    policy = FamilyPolicy("qwen2")
    critic = PromptCritic(saved(policy, tmp_path))
    critic.build()
    assert critic(PROMPTS).sigmoid().tolist() == [0.5] * 5
    torch.testing.assert_close(critic.model.model.state_dict(), policy.model.model.state_dict())


def test_a_folder_with_another_classifier(tmp_path: Path):
    critic = make_critic()
    critic.model.config.num_labels = 3
    critic.model.score = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(InputError) as raised:
        PromptCritic(saved(critic, tmp_path)).build()
    assert str(raised.value) == (
        f"`model.critic.pretrained`={str(tmp_path)!r} has a head `score.weight` of the shape [3, 16], and a critic needs [1, 16], one prediction; give a "
        "causal language model, such as Qwen/Qwen2.5-0.5B, or an exported critic."
    )


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    make_critic().model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as raised:
        PromptCritic(str(tmp_path)).build()
    assert str(raised.value) == (
        f"`model.critic.tokenizer`={str(tmp_path)!r} holds no tokenizer, only a model whose family has one; give the "
        "folder or hub id of a tokenizer."
    )


def test_a_critic_needs_a_model_and_a_tokenizer():
    with pytest.raises(InputError) as raised:
        PromptCritic(config=family_config("qwen2", 38)).build()
    assert str(raised.value) == "`model.critic` needs `pretrained`, or `config` together with `tokenizer`."
    with pytest.raises(InputError) as raised:
        FamilyCritic().build()
    assert (
        str(raised.value) == "`model.critic` needs `pretrained` (a folder or hub id) or `config` (random weights)."
    )
