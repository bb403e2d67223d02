"""Tokenizers and models from folders, and what is said of those that cannot be used."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, FamilyPolicy, family_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.loading import check_exists, load_model, load_tokenizer
from sppo_lightning.models.tiny import word_tokenizer


def saved(folder: Path, **special: Any) -> str:
    tokenizer = word_tokenizer(WORDS.split())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_comes_back_as_it_was_saved(tmp_path: Path):
    tokenizer = load_tokenizer(saved(tmp_path, eos_token="<eos>", pad_token="<pad>"), "model.policy.tokenizer")
    assert tokenizer("1 + ; z <eos>")["input_ids"] == word_tokenizer(WORDS.split())("1 + ; z <eos>")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_a_generic_tokenizer_beside_a_model_of_a_known_type(tmp_path: Path):
    policy = FamilyPolicy("qwen2")
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "model.policy.tokenizer")
    assert tokenizer("9 - 4 = ;")["input_ids"] == policy.tokenizer("9 - 4 = ;")["input_ids"]
    assert tokenizer.decode([5, 6]) == policy.tokenizer.decode([5, 6])


def test_a_tokenizer_without_an_end_of_sequence_token(tmp_path: Path):
    with pytest.raises(InputError) as raised:
        load_tokenizer(saved(tmp_path, pad_token="<pad>"), "model.policy.tokenizer")
    assert str(raised.value) == (
        f"The tokenizer of `model.policy.tokenizer`={str(tmp_path)!r} has no end-of-sequence token, so no response "
        "could stop; set `eos_token` in its tokenizer_config.json."
    )


def test_a_tokenizer_without_a_pad_token(tmp_path: Path):
    with pytest.warns(UserWarning, match="has no pad token; its end-of-sequence token '<eos>' is used for padding"):
        tokenizer = load_tokenizer(saved(tmp_path, eos_token="<eos>"), "model.policy.tokenizer")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(saved(tmp_path, eos_token="<eos>", pad_token="<pad>"), "model.policy.tokenizer")


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"^`model.critic.tokenizer`='.*' holds no tokenizer that transformers can load"
    ):
        load_tokenizer(str(tmp_path), "model.critic.tokenizer")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c"])
def test_a_missing_folder(name: str):
    with pytest.raises(InputError) as raised:
        check_exists(name, "model.policy.pretrained")
    assert str(raised.value) == (
        f"`model.policy.pretrained`={name!r} does not exist; give the folder of a Hugging Face model (a warm start "
        "writes one) or a hub id such as Qwen/Qwen2.5-1.5B."
    )


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-1.5B"])
def test_a_hub_id_is_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    check_exists(name, "model.policy.pretrained")


def test_a_missing_name_below_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^`model.policy.pretrained`='runs/sft' does not exist"):
        check_exists("runs/sft", "model.policy.pretrained")


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(InputError) as raised:
        load_model(AutoModelForCausalLM, str(tmp_path), None, setting="model.policy")
    assert str(raised.value) == (
        f"`model.policy.pretrained`={str(tmp_path)!r} cannot be loaded as AutoModelForCausalLM (Unrecognized model in "
        f"{tmp_path}); give the folder or hub id of another model, such as Qwen/Qwen2.5-1.5B."
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "`model.policy` needs `pretrained` (a folder or hub id) or `config` (random weights)."),
        ({"hidden_size": 16}, "`model.policy.config` needs a `model_type` that transformers knows, such as qwen2."),
        (
            {"model_type": "qwem2"},
            "`model.policy.config.model_type`='qwem2' cannot be built as AutoModelForCausalLM (Unrecognized model "
            "identifier: qwem2); correct its values or use another family, such as qwen2.",
        ),
        (
            {"model_type": "qwen2", "hidden_size": "16"},
            "`model.policy.config.model_type`='qwen2' cannot be built as AutoModelForCausalLM (Validation error for "
            "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: '16')); correct "
            "its values or use another family, such as qwen2.",
        ),
    ],
)
def test_a_config_that_cannot_be_used(config: Any, sentence: str):
    with pytest.raises(InputError) as raised:
        load_model(AutoModelForCausalLM, None, config, setting="model.policy")
    assert str(raised.value) == sentence


@pytest.mark.parametrize("name", ["flash_attention_2", "flashy"])
@pytest.mark.parametrize("from_folder", [True, False])
def test_an_attention_that_cannot_be_used(tmp_path: Path, name: str, from_folder: bool):
    config = family_config("qwen2", 38)
    if from_folder:
        load_model(AutoModelForCausalLM, None, config, setting="model.policy")[0].save_pretrained(tmp_path)  # type: ignore[operator]
    where = (str(tmp_path), None) if from_folder else (None, config)
    with pytest.raises(InputError) as raised:
        load_model(AutoModelForCausalLM, *where, setting="model.policy", attn_implementation=name)
    assert str(raised.value).startswith(f"`model.policy.attn_implementation`={name!r} cannot be used here (")
    assert str(raised.value).endswith("); use sdpa or eager.")


def test_weights_are_float32_and_dropout_is_off_whatever_the_folder_says(tmp_path: Path):
    config = family_config("gpt2", 38) | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    first, _ = load_model(AutoModelForCausalLM, None, config, setting="model.policy")
    first.to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    model: Any = load_model(AutoModelForCausalLM, str(tmp_path), None, setting="model.policy")[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    built, _ = load_model(AutoModelForCausalLM, None, config | {"dtype": "bfloat16"}, setting="model.policy")
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    ids = torch.tensor([[4, 5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_policys_folder_holds_all_that_a_policy_needs(tmp_path: Path):
    policy = FamilyPolicy("llama")
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = CausalLMPolicy(str(tmp_path))
    loaded.build()
    torch.testing.assert_close(loaded.state_dict(), policy.state_dict())
    assert loaded.tokenizer("1 + 2")["input_ids"] == policy.tokenizer("1 + 2")["input_ids"]
    assert loaded.eos_token_ids == [1]


def test_a_folder_without_the_output_embedding(tmp_path: Path):
    """transformers would draw it at random, with a warning."""
    policy = FamilyPolicy("llama")
    policy.model.base_model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError) as raised:
        CausalLMPolicy(str(tmp_path)).build()
    assert str(raised.value) == (
        f"`model.policy.pretrained`={str(tmp_path)!r} lacks the weights `lm_head.weight` of LlamaForCausalLM, which "
        "would start at random; give the folder or hub id of a whole model."
    )


def test_a_folder_whose_weights_are_of_another_size(tmp_path: Path):
    policy = FamilyPolicy("llama")
    policy.model.config.intermediate_size = 64
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError) as raised:
        CausalLMPolicy(str(tmp_path)).build()
    assert str(raised.value) == (
        f"`model.policy.pretrained`={str(tmp_path)!r} holds `model.layers.0.mlp.down_proj.weight` of shape [16, 32], "
        "where its config makes [16, 64] of it; give a folder whose config.json and weights agree."
    )
