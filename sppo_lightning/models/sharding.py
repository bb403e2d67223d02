"""Models whose weights are spread over ranks: how they come to be, and how to see them whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from sppo_lightning.errors import InputError
from sppo_lightning.models.quantized import quantized_names
from sppo_lightning.models.tensor_parallel import parallelize


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of `module` over the ranks of `mesh`, in place, block by block.

    Its class names in `forwards` those methods, besides `forward`, that need the weights.

    Args:
        module: A policy or a critic.
        mesh: `data_parallel`, over which weights are spread and gathered when they are needed (FSDP2), by
            `tensor_parallel`, over which layers are cut and computed in parts.

    Raises:
        InputError: where it cannot be.
    """
    if quantized_names(module):
        raise InputError(
            "`trainer.strategy` shards the weights, which `lora.load_in_4bit` holds in 4 bits; use ddp, or leave "
            "`load_in_4bit` out."
        )
    if mesh["tensor_parallel"].size() > 1:
        parallelize(module, mesh["tensor_parallel"])
    for block in module.modules():
        if isinstance(block, GradientCheckpointingLayer):
            fully_shard(block, mesh=mesh["data_parallel"])
    # what is kept whole after a forward without a backward would not see the optimizer's next step
    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)
    forwards: Iterable[str] = getattr(module, "forwards", ())
    for name in forwards:
        register_fsdp_forward_method(module, name)


def settle_mesh(strategy: ModelParallelStrategy, devices: int, nodes: int) -> None:
    """Use all ranks, `devices` on each of the `nodes`, where the strategy's sizes are left to us.

    Raises:
        InputError: the sizes make another number of ranks.
    """
    ranks = devices * nodes
    if strategy._tensor_parallel_size == "auto":  # by which Lightning means all devices of a node
        strategy._tensor_parallel_size = devices
    if strategy._data_parallel_size == "auto":  # by which Lightning means the number of nodes
        strategy._data_parallel_size = max(1, ranks // strategy._tensor_parallel_size)
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    if data * tensor != ranks:
        raise InputError(
            f"`trainer.strategy`=ModelParallelStrategy over {ranks} ranks cannot have `tensor_parallel_size`: "
            f"{tensor} and `data_parallel_size`: {data}; use a `tensor_parallel_size` that divides {ranks}, and "
            "leave the other out."
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds but a part of the weights, and every forward gathers them: a collective."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(weight: Tensor) -> Tensor:
    """All of a weight, of which a rank may hold but a part; then a collective."""
    full: Any = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return full


def local(weight: Tensor) -> Tensor:
    """The part of a weight that is on this rank."""
    part: Any = weight.to_local() if isinstance(weight, DTensor) else weight
    return part
