"""Whether a final answer is the gold answer: exactly and at once where possible, else by sympy in workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from sppo_lightning.errors import InputError
from sppo_lightning.verification.answers import compare, extract_answer, is_refused, sides, why_ill_formed
from sppo_lightning.verification.workers import WorkerPool

MathStatus = Literal["correct", "wrong", "no_answer", "timeout", "crashed", "unparsable_gold"]

_SCORES: dict[MathStatus, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "no_answer": 0.0,
    "timeout": 0.0,  # the response's doing, so it must not pay
    "crashed": None,
    "unparsable_gold": None,
}


@dataclass(frozen=True, slots=True)
class MathVerdict:
    """What became of one response."""

    status: MathStatus
    answer: str | None  # as extracted; None where the response gives none

    @property
    def score(self) -> float | None:
        """1.0 for a correct answer, 0.0 for any other, `None` where nothing can be said about it."""
        return _SCORES[self.status]


def verify_math(
    responses: Sequence[str], golds: Sequence[str], *, timeout_seconds: float = 2.0, workers: int = 2
) -> list[MathVerdict]:
    """Compare the final answer of each response with its gold answer.

    Args:
        responses: What the policy wrote.
        golds: The gold answer to each.
        timeout_seconds: Time that one comparison may take in a worker before it is killed and scored 0.
        workers: Number of worker processes, started by the first comparison that needs one.

    Returns:
        One verdict for each response, in order. Equal (answer, gold) pairs are compared once.

    Raises:
        InputError: The numbers of responses and gold answers differ.
    """
    if len(responses) != len(golds):
        raise InputError(
            f"verify_math() got {len(responses)} responses and {len(golds)} gold answers; "
            "give one for each response."
        )
    answers = [extract_answer(response) for response in responses]
    pairs = list(zip(answers, golds, strict=True))
    statuses = {pair: _decide(*pair) for pair in dict.fromkeys(pairs)}
    undecided = [pair for pair, status in statuses.items() if status is None]
    if undecided:
        items = [(sides(answer or "", gold), gold) for answer, gold in undecided]
        found = _pool(workers).run(items, timeout_seconds)
        statuses.update(zip(undecided, cast(list[MathStatus], found), strict=True))
    return [MathVerdict(status=cast(MathStatus, statuses[pair]), answer=pair[0]) for pair in pairs]


def _decide(answer: str | None, gold: str) -> MathStatus | None:
    """The verdict as far as it needs no worker; `None` where it needs one."""
    if why_ill_formed(gold) is not None:
        return "unparsable_gold"
    if answer is None:
        return "no_answer"
    verdict = compare(answer, gold)
    if verdict is None and is_refused(answer, gold):
        verdict = False
    if verdict is None:
        parts = [compare(side, gold) for side in sides(answer, gold)]
        verdict = False if False in parts else None if None in parts else True
    return None if verdict is None else "correct" if verdict else "wrong"


_pools: dict[int, WorkerPool] = {}  # by number of workers


def _pool(workers: int) -> WorkerPool:
    return _pools.setdefault(workers, WorkerPool(workers))


def close_workers() -> None:
    """End all worker processes; the next comparison that needs one starts them anew."""
    for pool in list(_pools.values()):
        pool.close()


os.register_at_fork(after_in_child=_pools.clear)  # a forked process cannot use its parent's workers
