"""Python objects over all ranks; one process is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_ranks() -> tuple[int, int]:
    """Which rank this process is, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank passed, by rank, on every rank: a collective, so all ranks (of `group`) must call it."""
    ranks = rank_and_ranks()[1] if group is None else group.size()
    found: list[Any] = [value] * ranks
    if ranks > 1:
        dist.all_gather_object(found, value, group)
    return found


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks' tensors, by rank, of which each may have another number; a collective."""
    return torch.cat(gather_objects(rows.cpu())).to(rows.device)


def exchange_bytes(parts: Sequence[bytes], device: torch.device) -> list[bytes]:
    """What every rank had for this one, by rank, where `parts[r]` is for rank `r`: a collective over `device`."""
    sizes = torch.tensor([len(part) for part in parts], device=device)
    theirs = torch.empty_like(sizes)
    dist.all_to_all_single(theirs, sizes)
    received = torch.empty(int(theirs.sum()), dtype=torch.uint8, device=device)
    sent = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).to(device)
    dist.all_to_all_single(received, sent, theirs.tolist(), sizes.tolist())
    return [part.cpu().numpy().tobytes() for part in received.split(theirs.tolist())]
