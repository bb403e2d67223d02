"""Models whose weights are spread over ranks (FSDP2): how they come to be, and how to see them whole."""

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


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of `module` over the ranks of the one-dimensional `mesh`, in place, block by block.

    Its class names in `forwards` those methods, besides `forward`, that need the weights whole.
    """
    if quantized_names(module):
        raise InputError(
            "`trainer.strategy` shards the weights, which `lora.load_in_4bit` holds in 4 bits; use ddp, or leave "
            "`load_in_4bit` out."
        )
    for block in module.modules():
        if isinstance(block, GradientCheckpointingLayer):
            fully_shard(block, mesh=mesh)
    # what is kept whole after a forward without a backward would not see the optimizer's next step
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    forwards: Iterable[str] = getattr(module, "forwards", ())
    for name in forwards:
        register_fsdp_forward_method(module, name)


def settle_mesh(strategy: ModelParallelStrategy, ranks: int) -> None:
    """Spread data and weights over all `ranks` where `data_parallel_size` is left to us.

    Raises:
        InputError: the sizes say something else.
    """
    if strategy._data_parallel_size == "auto":  # by which Lightning means the number of nodes
        strategy._data_parallel_size = ranks
    sizes = strategy._data_parallel_size, strategy._tensor_parallel_size
    if sizes != (ranks, 1):
        raise InputError(
            f"`trainer.strategy`=ModelParallelStrategy over {ranks} ranks needs `tensor_parallel_size`: 1 and, if "
            f"any, `data_parallel_size`: {ranks}, not {sizes[1]} and {sizes[0]}."
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
