"""LoRA: small trained matrices beside the frozen linear layers of a transformers model, through peft."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sppo_lightning.errors import InputError
from sppo_lightning.models.loading import base_of, first_sentence
from sppo_lightning.models.quantized import plain, quantized_names
from sppo_lightning.models.sharding import whole

_ADAPTER = "default"  # peft's name for a model's only adapter


@dataclass(frozen=True)
class LoRA:
    """Train `W + (alpha / rank) · B A` in place of `W`, where `A` and `B` alone move and `B` starts at zero.

    Source: arXiv 2106.09685.

    Args:
        rank: Rows of `A` and columns of `B`.
        alpha: Scale of the update, divided by `rank`.
        dropout: Share of the inputs of `A` that are left out while gradients are computed; above 0 the update's
            log-probabilities are no longer those of the sampler, nor a resumed run the same to the bit.
        target_modules: Names of the linear layers that are adapted, a regular expression for them, or
            `all-linear`: all but the head; peft's choice for the model's family if null.
        load_in_4bit: Hold the linear layers' own weights in 4 bits (NF4): a quarter of bf16's memory. Needs the
            extra `quantized` and `pretrained`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str | None = "all-linear"
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        checks = [
            ("rank", self.rank, 1 <= self.rank <= 2**14, "from 1 to 2**14"),
            ("alpha", self.alpha, 0 < self.alpha < math.inf, "above 0 and finite"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "0 or more and below 1"),
            ("target_modules", self.target_modules, self.target_modules not in ([], ""), "names, or all-linear"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise InputError(f"`lora.{name}`={value!r} cannot be used; it must be {allowed}.")


def add_adapters(model: Any, lora: LoRA, setting: str, head: Collection[str] = ()) -> None:
    """Put adapters into `model`, in place, and leave them and the weights named in `head` alone trainable.

    Raises:
        InputError: peft is not installed, or `target_modules` names what is no linear layer below the head.
    """
    try:
        from peft import LoraConfig

        below = {id(module) for module in base_of(model).modules()}
        above = [name for name, module in model.named_modules() if id(module) not in below and name]
        model.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                exclude_modules="|".join(map(re.escape, above)) or None,
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            ),
            _ADAPTER,
        )
    except ImportError as error:
        raise InputError(
            f"`{setting}.lora` needs peft ({first_sentence(error)}); install the extra: "
            "pip install 'sppo-lightning[lora]'."
        ) from error
    except ValueError as error:
        raise InputError(
            f"`{setting}.lora.target_modules`={lora.target_modules!r} cannot be adapted "
            f"({first_sentence(error)}); name linear layers of {type(model).__name__} below its head."
        ) from error
    _check_targets(model, lora, setting)
    for layer in _layers(model).values():
        if lora.dropout:
            layer.lora_dropout[_ADAPTER] = _UpdateDropout(lora.dropout)
    model.eval()
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.requires_grad_(True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the base weights alone; without adapters it does nothing.

    Not by peft's `disable_adapters`, which also flips `requires_grad`: sharding strategies read that on first use.
    """
    layers = _layers(model).values()
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@torch.no_grad()
def merged_weights(model: nn.Module, device: torch.device | str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model that `model` was before its adapters, with those merged into them.

    One at a time, so that a second model need not fit beside the first; what is merged goes to `device`, and all
    other weights are the model's own. A collective at each weight of a sharded model, which is whole here.
    """
    layers, weights = _layers(model), dict(model.named_parameters(remove_duplicate=False))
    quantized = quantized_names(model)
    for name, weight in model.state_dict().items():
        if name.partition(".weight.")[0] + ".weight" in quantized - {name}:
            continue  # how its 4 bits are to be read
        weight = plain(weights[name]) if name in quantized else weight
        part = re.match(r"(.+?)\.(base_layer|lora_\w+)\.(.+)", name)
        if part is None or part[1] not in layers:
            yield name, whole(weight)
        elif part[2] == "base_layer":
            if part[3] == "weight" and not layers[part[1]].disable_adapters:
                weight = whole(weight + layers[part[1]].get_delta_weight(_ADAPTER)).to(device or weight.device)
            yield f"{part[1]}.{part[3]}", whole(weight)


def save_merged(model: Any, path: Path, writes: bool = True) -> None:
    """Write the folder of the model, whole and with its adapters merged; `model` stays as it is.

    A collective where the model is sharded, of which the ranks with `writes` keep the weights and write.
    """
    merged = ((name, weight.cpu()) for name, weight in merged_weights(model, "cpu"))
    weights = {name: weight for name, weight in merged if writes}
    if not writes:
        return
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = False  # by which save_pretrained would write the adapters alone
    try:
        model.save_pretrained(path, state_dict=weights)
    finally:
        model._hf_peft_config_loaded = adapted


def save_adapter(model: Any, path: Path, head: Collection[str] = (), writes: bool = True) -> None:
    """Write the adapters, and the weights named in `head`, as a folder that peft loads onto the base model.

    A collective where the model is sharded, of which the ranks with `writes` write.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    weights |= {name: weight for name, weight in model.state_dict().items() if name in head}
    weights = {name: whole(weight) for name, weight in weights.items()}
    if not writes:
        return
    config = copy.copy(model.peft_config[_ADAPTER])
    config.task_type = "SEQ_CLS" if head else "CAUSAL_LM"
    config.modules_to_save = sorted({name.split(".")[0] for name in head}) or None
    config.inference_mode = True
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    tensors = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, path / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


class _UpdateDropout(nn.Dropout):
    """Active where gradients are computed: the models never enter training mode, and sampling is exact."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(input, self.p, training=torch.is_grad_enabled())


def _layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; none without adapters, and then peft need not be there."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _check_targets(model: nn.Module, lora: LoRA, setting: str) -> None:
    """Refuse layers that are not linear (a tied embedding among them), and names that nothing bears."""
    from peft.tuners import lora as kinds

    linear = (kinds.Linear, *filter(None, [getattr(kinds, "Linear4bit", None)]))  # where bitsandbytes is there
    layers = _layers(model)
    wrong = [name for name, layer in layers.items() if not isinstance(layer, linear)]
    if isinstance(lora.target_modules, list):
        wrong += [t for t in lora.target_modules if not any(f".{name}".endswith(f".{t}") for name in layers)]
    if wrong:
        raise InputError(
            f"`{setting}.lora.target_modules`={lora.target_modules!r}: `{wrong[0]}` is no linear layer of "
            f"{type(model).__name__} below its head; name others, such as q_proj, or use all-linear."
        )
