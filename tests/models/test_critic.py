"""The critic: what it reads, what it starts with, and that a prompt's value depends on nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, family_config, make_critic
from tokenizers.processors import TemplateProcessing

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


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "mistral", "gemma2"])
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


@pytest.mark.parametrize("family", ["granite", "bert"])
def test_a_family_without_a_value_head(family: str):
    config = {"granite": family_config("granite", 38), "bert": {"model_type": "bert", "num_hidden_layers": 1}}[
        family
    ]
    with pytest.raises(InputError) as raised:
        FamilyCritic(config=config).build()
    granite = (
        "`model.critic.config.model_type`='granite' cannot be built as AutoModelForSequenceClassification "
        "(Unrecognized configuration class <class 'transformers.models.granite.configuration_granite.GraniteConfig'> "
        "for this kind of AutoModel: AutoModelForSequenceClassification); use another family, such as qwen2."
    )
    bert = (
        f"`model.critic`={config!r}: BertForSequenceClassification has no linear value head named `score`, so it is "
        "no causal model; use one, such as Qwen/Qwen2.5-0.5B."
    )
    assert str(raised.value) == {"granite": granite, "bert": bert}[family]


def test_the_critic_reads_with_its_own_tokenizer_and_chat_template():
    critic = make_critic()  # its vocabulary is the policy's backwards
    assert critic.encode(PROMPTS[:1]) == [critic.tokenizer("1 + 2 =")["input_ids"]]
    turns = ({"role": "user", "content": "1 + 2"},)
    chat = Prompt("<template of the policy>", "", "sums", 0, messages=turns)
    assert critic.encode([chat]) == [critic.tokenizer("<template of the policy>")["input_ids"]]  # has no template
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


def test_a_folder_with_weights_and_tokenizer_is_enough(tmp_path: Path):
    critic = make_critic()
    critic.model.save_pretrained(tmp_path)
    critic.tokenizer.save_pretrained(tmp_path)
    loaded: Any = PromptCritic(str(tmp_path))
    loaded.build()
    assert loaded.encode(PROMPTS) == critic.encode(PROMPTS)
    assert loaded(PROMPTS).tolist() == [0.0] * 5  # the value head starts anew
    torch.testing.assert_close(loaded.model.model.state_dict(), critic.model.model.state_dict())


def test_a_critic_needs_a_model_and_a_tokenizer():
    with pytest.raises(InputError) as raised:
        PromptCritic(config=family_config("qwen2", 38)).build()
    assert str(raised.value) == "`model.critic` needs `pretrained`, or `config` together with `tokenizer`."
    with pytest.raises(InputError) as raised:
        FamilyCritic().build()
    assert (
        str(raised.value) == "`model.critic` needs `pretrained` (a folder or hub id) or `config` (random weights)."
    )
