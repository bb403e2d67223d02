"""Base weights held in 4 bits beside adapters: how they are loaded, read, and left out of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from sppo_lightning.errors import InputError


def in_4_bits(setting: str) -> BitsAndBytesConfig:
    """NF4 with double quantization; products are computed in the dtype of what comes in, or in autocast's.

    Source: QLoRA, arXiv 2305.14314.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"`{setting}.lora.load_in_4bit`=True needs bitsandbytes ({error}); install the extra: "
            "pip install 'sppo-lightning[quantized]'."
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def quantized_names(module: nn.Module) -> set[str]:
    """Names of the weights that are held in 4 bits; what state dicts have besides begins with one and a dot."""
    return {name for name, weight in module.named_parameters() if _is_quantized(weight)}


def plain(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for, `[out, in]`: itself, or what its 4 bits are read as."""
    if not _is_quantized(weight):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    state: Any = weight.quant_state  # type: ignore[attr-defined]
    return dequantize_4bit(weight.data, state)


def settle(owner: nn.Module, model: Any) -> None:
    """Make a model that has just been loaded in 4 bits one like any other, as part of `owner`.

    Checkpoints leave its 4-bit weights out, which do not move and come from where they came from, and what is
    made after it (a copy to sample from, an exported folder) has plain weights.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # or a first forward rounds the scales, in place
    model.hf_quantizer = None
    del model.config.quantization_config
    owner.register_state_dict_post_hook(_leave_out)
    owner.register_load_state_dict_post_hook(_do_not_miss)


def _is_quantized(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _leave_out(owner: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    left_out = {prefix + name for name in quantized_names(owner)}
    for key in list(state_dict):
        weight, dot, _ = key.partition(".weight.")
        if key in left_out or dot and f"{weight}.weight" in left_out:
            del state_dict[key]


def _do_not_miss(owner: nn.Module, incompatible: Any) -> None:
    there = tuple(f".{name}" for name in quantized_names(owner))
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not f".{key}".endswith(there)]
