"""Python objects over all ranks; one process is rank 0 of 1."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def rank_and_ranks() -> tuple[int, int]:
    """Which rank this process is, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: Any) -> list[Any]:
    """What every rank passed, by rank, on every rank: a collective, so all ranks must call it."""
    _, ranks = rank_and_ranks()
    found: list[Any] = [value] * ranks
    if ranks > 1:
        dist.all_gather_object(found, value)
    return found
