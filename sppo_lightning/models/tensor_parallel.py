"""Layers cut over a group of ranks that compute them together (tensor parallelism), by the plan of transformers.

Each rank brings rows of its own. The group computes the hidden states of all its rows, every rank a part of each
layer, and gets those of its own rows back: what is below and above the transformer need not know of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from sppo_lightning.errors import InputError
from sppo_lightning.models.loading import base_of
from sppo_lightning.ranks import gather_objects

_CUT = {"colwise", "rowwise"}  # by output features, from whole inputs; by input features, to whole outputs
_PARTIAL = "replicated_with_grad_allreduce"  # a whole weight whose gradient on a rank is of what that rank has
# from whole inputs to whole outputs: they stay whole
_WHOLE = {"replicate", "embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep"}
_WHOLE |= {"rowwise_split_input", "rowwise_rep"}


def parallelize(module: Any, group: DeviceMesh) -> None:
    """Cut the layers of a policy or critic over the ranks of the one-dimensional `group`, in place.

    Layers that the plan does not name are whole on every rank, and so is all above the transformer.

    Raises:
        InputError: Where transformers has no plan for the model, or one that cannot be followed.
    """
    model, base = module.model, base_of(module.model)
    _check(module, group.size())
    styles = {layer: style for _, layer, style in _planned(module, group.size())}
    below = set(base.modules())
    cut: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for layer in model.modules():
        if next(layer.parameters(recurse=False), None) is None:
            continue
        style = styles.get(layer, "replicate" if layer in below else _PARTIAL)
        for name, weight in layer.named_parameters(recurse=False):
            if weight not in cut:
                whole = distribute_tensor(weight.detach(), group, [_placement(style, name)], src_data_rank=None)
                cut[weight] = nn.Parameter(whole, weight.requires_grad)
            layer.register_parameter(name, cut[weight])
        _compute_locally(layer, style, group)
    module.group = group


def with_the_group(compute: Callable[..., Tensor], group: DeviceMesh | None, inputs: dict[str, Any]) -> Tensor:
    """`compute(**inputs)` of this rank's rows, `[n, l, H]`, computed with those of the group's other ranks.

    A collective of the group, where there is one.

    Args:
        compute: A transformer whose layers are cut over the group, of `[N, L]` tokens to `[N, L, H]`.
        group: The ranks, or None for this one alone.
        inputs: Token ids `[n, l]`, padded on the right, or `[1, l]` and `position_ids` that start anew with a row.
    """
    if group is None:
        return compute(**inputs)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    parts = gather_objects([inputs[name].cpu() for name in names], group.get_group())
    packed = "position_ids" in names
    width = max(tokens.shape[1] for tokens, *_ in parts)
    everything = {}
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        rows = values if packed else [F.pad(value, (0, width - value.shape[1])) for value in values]
        everything[name] = torch.cat(list(rows), dim=int(packed)).to(inputs[name].device)
    start = sum(tokens.shape[packed] for tokens, *_ in parts[: group.get_local_rank()])
    count, length = inputs[names[0]].shape
    hidden = copied(compute(**inputs | everything), group)  # to whose gradient each rank adds that of its own rows
    return hidden[:, start : start + length] if packed else hidden[start : start + count, :length]


def for_own_rows(weight: Any, group: DeviceMesh | None) -> Any:
    """A whole weight to compute with this rank's rows alone; its gradient is of all rows of the group."""
    return weight if group is None else copied(_local(weight), group)


def copied(value: Tensor, group: DeviceMesh) -> Tensor:
    """What is the same on all ranks, for each to compute a part with; the gradient is the sum of theirs."""
    whole = DTensor.from_local(value, group, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def summed(value: Tensor, group: DeviceMesh) -> Tensor:
    """The sum over the ranks, each of which goes on with all of it."""
    part = DTensor.from_local(value, group, [Partial()], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local()


def _local(weight: Any) -> Any:
    """The part of a weight that is on this rank."""
    return weight.to_local()


def _placement(style: str, name: str) -> Placement:
    if style == "colwise":
        return Shard(0)
    return Shard(1) if style == "rowwise" and name == "weight" else Replicate()


def _compute_locally(layer: nn.Module, style: str, group: DeviceMesh) -> None:
    """Let the forward of `layer` see its weights as plain tensors, of which this rank has all or its part."""
    compute = layer.forward
    plain = partial(for_own_rows, group=group) if style == _PARTIAL else _local

    def forward(*inputs: Any, **settings: Any) -> Any:
        held = dict(layer._parameters)
        own = {name: plain(weight) for name, weight in held.items() if weight is not None}
        bias = own.pop("bias", None) if style == "rowwise" else None
        layer._parameters.update(own if bias is None else own | {"bias": None})  # which is added once
        if style == "colwise":
            inputs = (copied(inputs[0], group),)
        try:
            outputs = compute(*inputs, **settings)
        finally:
            layer._parameters.update(held)
        if style == "rowwise":
            outputs = summed(outputs, group)
        return outputs if bias is None else outputs + bias.to(outputs.dtype)

    layer.forward = forward


def _planned(module: Any, ranks: int) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, layer and style of what the plan names; of an adapted layer those parts that are linear layers."""
    base = base_of(module.model)
    plan: dict[str, str] = getattr(base, "_tp_plan", None) or {}
    modules = dict(base.named_modules())
    for name in [*modules, *(name for name, _ in base.named_parameters())]:
        style = plan.get(re.sub(r"\d+", "*", name), "replicate")
        layer = modules.get(name)
        if style in _WHOLE:
            continue
        if layer is None or style not in _CUT | {_PARTIAL}:
            raise InputError(
                f"`tensor_parallel_size`={ranks}: transformers plans `{name}` of {_named(module)} as {style!r}, "
                "which is not supported here; use `tensor_parallel_size`: 1."
            )
        if hasattr(layer, "base_layer"):  # W + B A is cut as W is: B by its outputs, or A by its inputs
            adapter = layer.lora_B if style == "colwise" else layer.lora_A
            yield from ((name, part, style) for part in (layer.base_layer, *adapter.values()))
        else:
            yield name, layer, style


def _check(module: Any, ranks: int) -> None:
    """Raise `InputError` for what cannot be cut over so many ranks."""
    config = module.model.config.get_text_config()
    cut = [(name, layer, style) for name, layer, style in _planned(module, ranks) if style in _CUT]
    refused = f"`tensor_parallel_size`={ranks} cannot be used with {_named(module)}"
    reasons = {
        "transformers has no plan for it that cuts a layer": not cut,
        "its logits are no linear function of its hidden states": getattr(module, "own_head", None) is not None,
        f"`{module.setting}.compile` has not been tried with it": module.compile_blocks,
        f"`{module.setting}.lora.dropout` would differ between ranks": bool(module.lora and module.lora.dropout),
    }
    for reason, there in reasons.items():
        if there:
            raise InputError(f"{refused}: {reason}; use `tensor_parallel_size`: 1.")
    sizes = {
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
    }
    for name, layer, style in cut:
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{refused}: `{name}` is no linear layer; use `tensor_parallel_size`: 1.")
        sizes[f"the width of `{name}`"] = layer.out_features if style == "colwise" else layer.in_features
    for name, size in sizes.items():
        if size and size % ranks:
            raise InputError(f"{refused}: it does not divide {name}={size}; use one that does.")


def _named(module: Any) -> str:
    return f"`{module.setting}` ({type(module.model).__name__})"
