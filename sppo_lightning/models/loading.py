"""Tokenizers and transformers models, from a folder, the hub or a config, with errors one can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from sppo_lightning.errors import InputError

_GENERIC = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # tokenizers that are their tokenizer.json and no more


def load_tokenizer(name: str, setting: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder or hub repository `name`; `setting` is how the config calls it.

    A missing pad token is replaced by the end-of-sequence token, which is safe because masks are explicit
    everywhere; a missing end-of-sequence token raises `InputError`, because no response could ever stop.
    """
    check_exists(name, setting)
    try:
        # AutoTokenizer prefers the class registered for the model's type to the one that the folder names, and a
        # generic tokenizer.json beside, say, a Qwen2 model would be read with Qwen's rules
        generic = get_tokenizer_config(name).get("tokenizer_class") in _GENERIC
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`{setting}`={name!r} holds no tokenizer that transformers can load ({error})."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of `{setting}`={name!r} has no end-of-sequence token, so no response could stop; "
            "set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        rank_zero_warn(
            f"The tokenizer of `{setting}`={name!r} has no pad token; its end-of-sequence token "
            f"{tokenizer.eos_token!r} is used for padding, which the masks leave out."
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    auto_class: Any,
    pretrained: str | None,
    config: dict[str, Any] | None,
    *,
    setting: str,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """A model of `auto_class` in float32: weights from `pretrained`, or random ones for `config`.

    Master weights are float32 whatever `trainer.precision` says; mixed precision casts on the fly. Dropout is
    off, because the log-probabilities of the update must be those of the sampler.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if config is not None:
        settings = dict(config)
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise InputError(f"`{setting}.config` needs a `model_type` that transformers knows, such as qwen2.")
        try:
            built = AutoConfig.for_model(model_type, **settings, **_head_options(options))
        except ValueError as error:
            raise InputError(f"`{setting}.config.model_type`={model_type!r}: {error}") from error
        attention = {k: v for k, v in options.items() if k == "attn_implementation"}
        model = auto_class.from_config(built, **attention)
    elif pretrained is not None:
        check_exists(pretrained, f"{setting}.pretrained")
        try:
            model = auto_class.from_pretrained(
                pretrained, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"`{setting}.pretrained`={pretrained!r} holds no model that transformers can load ({error})."
            ) from error
    else:
        raise InputError(f"`{setting}` needs `pretrained` (a folder or hub id) or `config` (random weights).")
    return model.eval()


def _head_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "attn_implementation"}


def check_exists(name: str, setting: str) -> None:
    """Raise `InputError` when `name` reads as a local path but nothing is there."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if looks_local and not path.exists() and "/" in name:
        raise InputError(
            f"`{setting}`={name!r} does not exist; give the folder of a Hugging Face model "
            "(a warm start writes one) or a hub id such as Qwen/Qwen2.5-1.5B."
        )
