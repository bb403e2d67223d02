"""How an iteration is cut: mini-batches (one optimizer step each) and micro-batches (one backward each)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sppo_lightning.errors import InputError


@dataclass(frozen=True)
class MicroRows:
    """Rows of one forward on this rank."""

    index: list[int]  # their positions in the mini-batch of this rank
    counts: bool  # False for a row that only keeps this rank in step with the others, and must be masked


def check_mini_batch_size(sequences: int, mini_batch_size: int | None, ranks: int = 1) -> int:
    """The sequences of one optimizer step over all ranks; raises `InputError` when it does not divide."""
    if mini_batch_size is None:
        return sequences
    if mini_batch_size < 1 or sequences % mini_batch_size or mini_batch_size % ranks:
        good = [n for n in range(ranks, sequences + 1, ranks) if sequences % n == 0]
        nearest = sorted(sorted(good, key=lambda n: abs(n - mini_batch_size))[:2])
        raise InputError(
            f"`mini_batch_size`={mini_batch_size} does not divide the {sequences} sequences of an iteration"
            f"{f' evenly over {ranks} ranks' if ranks > 1 else ''}; use {' or '.join(map(str, nearest))}."
        )
    return mini_batch_size


def mini_batches(rows: int, rows_per_mini_batch: int) -> list[range]:
    """Consecutive rows of this rank; with interleaved ranks their union is the same for any number of ranks."""
    return [range(start, start + rows_per_mini_batch) for start in range(0, rows, rows_per_mini_batch)]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that `rows × longest` stays within `max_tokens`.

    Args:
        lengths: Tokens of each row, prompt and response.
        max_tokens: Token budget of one micro-batch, padding included; a single longer row is a micro-batch of
            its own.

    Returns:
        Positions into `lengths`, longest rows first, so that memory peaks at once and not later.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups
