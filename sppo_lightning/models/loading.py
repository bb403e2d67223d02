"""Tokenizers and transformers models, from a folder, the hub or a config, with errors one can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from sppo_lightning.errors import InputError
from sppo_lightning.memory import is_out_of_memory

LOAD_ERRORS = (AttributeError, ImportError, OSError, StrictDataclassError, ValueError)  # of transformers' loaders
_MOST_PARTS = 10_000  # layers or experts; each takes time to make, whatever its size
_GENERIC = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # tokenizers that are their tokenizer.json and no more


def load_tokenizer(name: str, setting: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder or hub repository `name`; `setting` is how the config calls it.

    A missing pad token is replaced by the end-of-sequence token, which is safe because masks are explicit
    everywhere; a missing end-of-sequence token raises `InputError`, because no response could ever stop.
    """
    tokenizer = read_tokenizer(name, setting, trust_remote_code)
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


def read_tokenizer(name: str, setting: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The same as it stands there, for reading alone; raises `InputError` where there is none."""
    check_exists(name, setting)
    try:
        # AutoTokenizer prefers the class registered for the model's type to the one that the folder names, and a
        # generic tokenizer.json beside, say, a Qwen2 model would be read with Qwen's rules
        generic = get_tokenizer_config(name).get("tokenizer_class") in _GENERIC
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # what files of another form lead to is of any kind
        raise InputError(
            f"`{setting}`={name!r} holds no tokenizer that transformers can load ({first_sentence(error)}); "
            "give the folder or hub id of another."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
        raise InputError(
            f"`{setting}`={name!r} holds no tokenizer, only a model whose family has one; give the folder or hub "
            "id of a tokenizer."
        )
    return tokenizer


def load_model(
    auto_class: Any,
    pretrained: str | None,
    config: dict[str, Any] | None,
    *,
    setting: str,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    adapt: Callable[[PreTrainedConfig], PreTrainedConfig] = lambda config: config,
    quantization: Any = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of `auto_class` in float32: weights from `pretrained`, or random ones for `config`.

    Master weights are float32 whatever `trainer.precision` says; mixed precision casts on the fly. Dropout is
    off, because the log-probabilities of the update must be those of the sampler. `setting` is how the
    configuration calls the module, `adapt` makes the config to load with of the model's own, and `quantization`
    is transformers' config of it.

    Returns:
        The model and transformers' loading info: `missing_keys`, the weights that are random, and
        `mismatched_keys`, those of another shape in the folder, as (name, found, needed).

    Raises:
        InputError: there is no such model, or it cannot be built.
    """
    refusal, way_out = _refusal(pretrained, config, setting)
    options: dict[str, Any] = {"dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        if config is None:
            own = AutoConfig.from_pretrained(str(pretrained), trust_remote_code=trust_remote_code)
            options |= {"config": adapt(own), "trust_remote_code": trust_remote_code}
            # what does not fit is in the info, and transformers' own error is a page long
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            options |= {} if quantization is None else {"quantization_config": quantization}
            model, info = auto_class.from_pretrained(pretrained, **options)
        elif quantization is not None:
            raise InputError(f"`{setting}.lora.load_in_4bit`=True needs `pretrained`, not `config`.")
        else:
            model = _from_config(auto_class, adapt(AutoConfig.for_model(**config)), options)
            info = {"missing_keys": set(model.state_dict()), "mismatched_keys": set()}
    except InputError:
        raise
    except Exception as error:  # what a config's values lead to in a family's own code is of any kind
        if is_out_of_memory(error):
            raise
        _check_attention(error, setting, attn_implementation)
        kind = "" if isinstance(error, LOAD_ERRORS) else f"{type(error).__name__}: "
        reason = f"{kind}{first_sentence(error)}"
        raise InputError(f"{refusal} as {auto_class.__name__} ({reason}); {way_out}.") from error
    return model.eval(), info


def _refusal(pretrained: str | None, config: dict[str, Any] | None, setting: str) -> tuple[str, str]:
    """What to say, and the way out, if a model cannot be made of these; raises if they name none."""
    if config is not None:
        model_type = config.get("model_type")
        if model_type is None:
            raise InputError(f"`{setting}.config` needs a `model_type` that transformers knows, such as qwen2.")
        for name, value in config.items():
            if re.search("layer|block|expert", str(name)) and isinstance(value, int) and value > _MOST_PARTS:
                raise InputError(f"`{setting}.config.{name}`={value} is more than any model has; lower it.")
            if name in ("num_hidden_layers", "n_layer") and value == 0:
                raise InputError(f"`{setting}.config.{name}`=0 leaves no layer that reads; use 1 or more.")
        return (
            f"`{setting}.config.model_type`={model_type!r} cannot be built",
            "correct its values or use another family, such as qwen2",
        )
    if pretrained is not None:
        check_exists(pretrained, f"{setting}.pretrained")
        if Path(pretrained, "adapter_config.json").is_file() and not Path(pretrained, "config.json").is_file():
            raise InputError(
                f"`{setting}.pretrained`={pretrained!r} holds adapters, not a model; give the folder of a whole "
                "one, with adapters merged, as HFExport writes it."
            )
        return (
            f"`{setting}.pretrained`={pretrained!r} cannot be loaded",
            "give the folder or hub id of another model, such as Qwen/Qwen2.5-1.5B",
        )
    raise InputError(f"`{setting}` needs `pretrained` (a folder or hub id) or `config` (random weights).")


def _from_config(auto_class: Any, config: PreTrainedConfig, options: dict[str, Any]) -> nn.Module:
    """A model with random weights, unless they are more than this machine's memory, which would take it down."""
    with torch.device("meta"):
        size = sum(4 * weight.numel() for weight in auto_class.from_config(config, **options).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(f"its weights take {size / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f} GiB")
    return auto_class.from_config(config, **options)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Compute attention in plain torch: flash kernels refuse float32, in which models are loaded, and CPUs."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def recompute_layers(model: nn.Module, setting: str) -> None:
    """Let each block of `model` recompute its activations in the backward pass.

    transformers' own switch works in training mode alone, which would turn dropout on and the sampler's cache off.
    """
    for layer in _layers(model, f"{setting}.gradient_checkpointing"):
        layer.forward = partial(_recomputed, layer.forward)


def compile_layers(model: nn.Module, setting: str) -> None:
    """Compile each block of `model` for any number of rows and tokens; names of weights stay as they are."""
    for layer in _layers(model, f"{setting}.compile"):
        layer.compile(dynamic=True)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _check_attention(error: Exception, setting: str, name: str | None) -> None:
    """Raise `InputError` where `error` is about the attention asked for: a package missing, or no such name."""
    if name and ("attn_implementation" in str(error) or "Attention" in str(error)):
        raise InputError(
            f"`{setting}.attn_implementation`={name!r} cannot be used here ({first_sentence(error)}); "
            "use sdpa or eager."
        ) from error


def base_of(model: Any) -> Any:
    """The transformer below the head; transformers looks for Llama 4's under a name that it has not."""
    return model.base_model if model.base_model is not model else model.model


def first_sentence(error: Exception) -> str:
    """Without the list of all classes that transformers appends; a line that ends in a colon has a next one."""
    return re.sub(r":\s*\n\s*", ": ", str(error).strip()).split("\n")[0].split(". ")[0].rstrip(".")


def check_exists(name: str, setting: str) -> None:
    """Raise `InputError` when `name` reads as a local path but nothing is there."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if looks_local and not path.exists() and "/" in name:
        raise InputError(
            f"`{setting}`={name!r} does not exist; give the folder of a Hugging Face model "
            "(a warm start writes one) or a hub id such as Qwen/Qwen2.5-1.5B."
        )


def _layers(model: nn.Module, setting: str) -> list[nn.Module]:
    """The blocks that `setting` is about; raises where there are none."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"`{setting}`=True: {type(model).__name__} has no blocks that transformers tells apart; set it "
            "to false."
        )
    return layers
