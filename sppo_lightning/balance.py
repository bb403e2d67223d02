"""Rows handed from rank to rank before an update, so that none waits for the one with the longest responses."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

from sppo_lightning.experience import Experience
from sppo_lightning.ranks import exchange_bytes, gather_objects, rank_and_ranks

_WORTH_IT = 1.02  # the most loaded rank's tokens, of the mean, above which rows are handed on


def balanced(module: Any, update: Experience) -> Experience:
    """About as many rows as other ranks get, of those of all ranks together; a collective.

    What is learned from them does not depend on where: losses are shares of the mini-batch over all ranks.

    Args:
        module: The `SPPOModule` that learns from them.
        update: This rank's rows of a mini-batch.

    Returns:
        Rows without scores of single verifiers, or `update` where it is as good.
    """
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return update
    costs = gather_objects(_tokens(module, update))
    targets = destinations(costs)
    if targets == [[rank] * len(own) for rank, own in enumerate(costs)]:
        return update
    kept = dataclasses.replace(update, rollouts=dataclasses.replace(update.rollouts, scores={}))
    device = update.rewards.device
    packed = kept.to("cpu")
    parts = [packed.rows([i for i, to in enumerate(targets[rank]) if to == other]) for other in range(ranks)]
    # what is unpickled comes from the run's other ranks, as with torch's own collectives of objects
    received = [pickle.loads(part) for part in exchange_bytes([pickle.dumps(p) for p in parts], device)]
    return Experience.concat(received).to(device)


def _tokens(module: Any, update: Experience) -> list[int]:
    """`N` tokens of the forwards that each row needs, of the policy's and the critic's."""
    moving, lengths = set(module.rows_that_move_the_policy(update)), update.rollouts.lengths
    critic = [0] * len(update) if module.critic is None else module.critic.lengths(update.rollouts)
    return [length * (i in moving) + more for i, (length, more) in enumerate(zip(lengths, critic, strict=True))]


def destinations(costs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rank that each row of each rank goes to; all ranks have the same number of rows, or one more or less.

    The costliest rows first, each to the rank that has least so far. Rows stay where they are if that is as good.
    """
    stay = [[rank] * len(own) for rank, own in enumerate(costs)]
    before = max(map(sum, costs))
    if before * len(costs) <= _WORTH_IT * sum(map(sum, costs)):
        return stay
    total, ranks = sum(map(len, costs)), len(costs)
    loads, places = [0] * ranks, [total // ranks + (rank < total % ranks) for rank in range(ranks)]
    targets = [list(own) for own in stay]
    rows = [(cost, rank, i) for rank, own in enumerate(costs) for i, cost in enumerate(own)]
    for cost, home, i in sorted(rows, key=lambda row: -row[0]):
        free = (rank for rank, left in enumerate(places) if left)
        to = min(free, key=lambda rank: (loads[rank], rank != home))
        loads[to] += cost
        places[to] -= 1
        targets[home][i] = to
    return targets if max(loads) < before else stay
