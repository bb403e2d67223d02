"""Critics of every family, with and without a sequence classifier of its own: what they load, keep and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sppo_lightning.batch import Prompt
from sppo_lightning.models import PromptCritic
from sppo_lightning.models.classifiers import register_classifier
from sppo_lightning.models.tiny import word_tokenizer

TOKENIZER = word_tokenizer(WORDS.split())
PROMPTS = [Prompt(text, "", "sums", i) for i, text in enumerate(["1 + 2 =", "9 - 4 = ; a b c", "2"])]
SPECIAL = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SIZES: dict[str, Any] = SPECIAL | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
# families whose base model is `model` or has another name, and one whose head is another than `score`
OWN: dict[str, dict[str, Any]] = {
    "qwen2": SIZES,
    "llama": SIZES,
    "mistral": SIZES,
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt2": SPECIAL | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},  # `transformer`
    "gpt_neox": SIZES | {"rotary_pct": 0.5},  # `gpt_neox`
    "modernbert-decoder": SIZES | {"bos_token_id": 1, "local_attention": 8},  # one more layer below it
}
MADE: dict[str, dict[str, Any]] = {
    "granite": SIZES | {"embedding_multiplier": 3.0},
    "cohere": SIZES,
    "apertus": SIZES,
    "olmoe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": SIZES | {"head_dim": 8},
    "codegen": SPECIAL | {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # `transformer`
    "gpt_neox_japanese": SIZES,  # `gpt_neox_japanese`
    "xglm": SPECIAL | {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
    "mamba": SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # `backbone`
    "falcon_h1": SIZES | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}
FAMILIES = OWN | MADE


class FamilyCritic(PromptCritic):
    tokenizer = TOKENIZER


def causal_model(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family])).eval()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


def test_which_families_have_a_classifier_of_their_own():
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    classified = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    assert set(MADE) <= causal - classified
    assert set(OWN) <= causal & classified


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_models_folder_as_the_critic(family: str, tmp_path: Path):
    model = causal_model(family, tmp_path / "model")
    critic: Any = FamilyCritic(str(tmp_path / "model"))
    critic.build()
    assert critic(PROMPTS).sigmoid().tolist() == [0.5] * 3
    for name, weight in model.base_model.named_parameters():
        torch.testing.assert_close(critic.model.base_model.get_parameter(name), weight)
    # the head is linear in the causal model's own hidden state at the last token, each prompt alone
    torch.nn.init.normal_(critic.value_head.weight)
    values = critic(PROMPTS)
    for prompt, value in zip(PROMPTS, values, strict=True):
        ids = torch.tensor([TOKENIZER(prompt.text)["input_ids"]])
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        if family == "modernbert-decoder":
            hidden = critic.model.head(hidden)
        torch.testing.assert_close(value, critic.value_head(hidden)[0], atol=1e-4, rtol=1e-4)
    assert values.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_critic_is_the_same_critic_and_a_classifier(family: str, tmp_path: Path):
    causal_model(family, tmp_path / "model")
    critic: Any = FamilyCritic(str(tmp_path / "model"))
    critic.build()
    torch.nn.init.normal_(critic.value_head.weight)
    values = critic(PROMPTS)
    critic.model.save_pretrained(tmp_path / "critic")
    again: Any = FamilyCritic(str(tmp_path / "critic"))
    again.build()
    torch.testing.assert_close(again(PROMPTS), values, atol=1e-5, rtol=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert (classifier.config.num_labels, classifier.config.id2label) == (1, {0: "solvable"})
    rate = pipeline("text-classification", model=classifier, tokenizer=TOKENIZER, device="cpu")
    found = rate([prompt.text for prompt in PROMPTS], function_to_apply="sigmoid")
    assert [entry["label"] for entry in found] == ["solvable"] * 3
    torch.testing.assert_close(torch.tensor([e["score"] for e in found]), values.sigmoid(), atol=1e-5, rtol=0)


def test_a_new_process_registers_the_family_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    causal_model("granite", tmp_path / "model")
    critic: Any = FamilyCritic(str(tmp_path / "model"))
    critic.build()
    torch.nn.init.normal_(critic.value_head.weight)
    critic.model.save_pretrained(tmp_path / "critic")
    monkeypatch.setattr(AutoModelForSequenceClassification._model_mapping, "_extra_content", {})
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    register_classifier("granite")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    ids = torch.tensor([TOKENIZER(PROMPTS[1].text)["input_ids"]])
    torch.testing.assert_close(model(ids).logits[0, 0], critic(PROMPTS)[1], atol=1e-5, rtol=1e-5)


def test_registering_leaves_a_familys_own_classifier():
    register_classifier("qwen2")
    register_classifier("t5")  # no causal model
    known = AutoModelForSequenceClassification._model_mapping
    assert known[CONFIG_MAPPING["qwen2"]].__module__ == "transformers.models.qwen2.modeling_qwen2"
    assert known[CONFIG_MAPPING["t5"]].__module__ == "transformers.models.t5.modeling_t5"
    with pytest.raises(KeyError):
        register_classifier("qwem2")
