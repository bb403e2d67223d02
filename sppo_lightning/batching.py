"""How an iteration is cut: mini-batches (one optimizer step each) and micro-batches (one backward each)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sppo_lightning.errors import InputError

_LEAST_START_TOKENS = 64


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


def with_extra(parts: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[list[int]]:
    """Mini-batches that hold the rows behind all of theirs too, each beside the last other row of its prompt.

    Args:
        parts: Rows of each mini-batch.
        prompts: The prompt of every row, those of no part included.
    """
    filled = [list(part) for part in parts]
    part_of = {prompts[row]: part for part in filled for row in part}
    for row in range(sum(map(len, parts)), len(prompts)):
        part_of[prompts[row]].append(row)
    return filled


def micro_batches(lengths: Sequence[int], max_tokens: int, packed: bool = False) -> list[list[int]]:
    """Group rows so that no forward is of more than `max_tokens`, padding included.

    Args:
        lengths: Tokens of each row, prompt and response.
        max_tokens: Token budget of one micro-batch; a single longer row is a micro-batch of its own.
        packed: Whether rows are laid end to end, without padding.

    Returns:
        Positions into `lengths`, longest rows first, so that memory peaks at once and not later.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = [lengths[i] for i in order]
    groups = _filled(sizes, max_tokens) if packed else _cut(sizes, max_tokens)
    return [[order[place] for place in group] for group in groups]


def _cut(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Neighbours in groups of `rows × longest` tokens, for descending `sizes`: as few tokens in all as can be.

    A group costs as much as some tokens besides, for what it takes to start a forward.
    """
    count, start_cost = len(sizes), max(max_tokens / 32, _LEAST_START_TOKENS)
    cost = np.full(count + 1, np.inf)  # of the first rows, up to each
    cost[0] = 0.0
    cuts = np.zeros(count + 1, dtype=int)  # where the last group of these rows begins
    for start, longest in enumerate(sizes):
        most = max(1, max_tokens // longest) if longest else count
        ends = np.arange(start + 1, min(count, start + most) + 1)
        costs = cost[start] + (ends - start) * longest + start_cost
        better = costs < cost[ends]
        cost[ends[better]] = costs[better]
        cuts[ends[better]] = start
    groups: list[list[int]] = []
    end = count
    while end:
        groups.append(list(range(cuts[end], end)))
        end = cuts[end]
    return groups[::-1]


def _filled(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups of up to `max_tokens` in all, for descending `sizes`: few, and filled alike."""
    wanted = -(-sum(sizes) // max_tokens)
    groups: list[list[int]] = [[] for _ in range(wanted)]
    filled = [0] * wanted
    for place, size in enumerate(sizes):
        least = min(range(len(groups)), key=filled.__getitem__)
        if groups[least] and filled[least] + size > max_tokens:
            least = len(groups)
            groups.append([])
            filled.append(0)
        groups[least].append(place)
        filled[least] += size
    return groups
