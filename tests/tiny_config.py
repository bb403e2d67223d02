"""A config of SPPO that runs in a second, and the files that it names."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.models.tiny import word_tokenizer

WORDS = "a b c d"
TINY = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
}
ROLLOUT = {
    "class_path": "sppo_lightning.callbacks.RolloutGeneration",
    "init_args": {"sampling": {"max_new_tokens": 2}},
}
EXACT = {"class_path": "sppo_lightning.callbacks.ExactMatch", "init_args": {"extract": "whole"}}
CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "sppo_lightning.SPPOModule",
        "init_args": {
            "policy": {
                "class_path": "sppo_lightning.models.CausalLMPolicy",
                "init_args": {"tokenizer": "./tokenizer", "config": {**TINY, "vocab_size": 7}},
            },
            "critic": {
                "class_path": "sppo_lightning.models.PromptCritic",
                "init_args": {"tokenizer": "./critic", "config": TINY},
            },
        },
    },
    "data": {
        "class_path": "sppo_lightning.data.PromptDataModule",
        "init_args": {"train": "train.jsonl", "batch_size": 4, "shuffle": False},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "run",
        "callbacks": [ROLLOUT, EXACT],
    },
}
GOOD = [{"prompt": "a b", "answer": "c"}] * 4  # training rows


def changed(changes: Mapping[str, Any], config: Mapping[str, Any] = CONFIG) -> dict[str, Any]:
    """The config with other values at dotted paths."""
    result = copy.deepcopy(dict(config))
    for path, value in changes.items():
        node = result
        *keys, last = path.split(".")
        for key in keys:
            node = node[key]
        node[last] = value
    return result


def write_files(
    changes: Mapping[str, Any],
    rows: list[Any] = GOOD,
    tokenizer: Mapping[str, Any] | None = None,
    folder: Path = Path(),
) -> None:
    """`config.yaml`, the training rows and the tokenizers (the policy's with other attributes) in this folder."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    word_tokenizer(WORDS.split()).save_pretrained(folder / "critic")
    policys = word_tokenizer(WORDS.split())
    for name, value in (tokenizer or {}).items():
        setattr(policys, name, value)
    policys.save_pretrained(folder / "tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(changes)))
