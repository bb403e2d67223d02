"""Whether a final answer is the gold answer: exactly and at once where possible, else by sympy in workers."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from sppo_lightning.errors import InputError
from sppo_lightning.verification.comparison import Comparison
from sppo_lightning.verification.extraction import extract_answer
from sppo_lightning.verification.notation import Malformed, normalize
from sppo_lightning.verification.refusals import why_ill_formed
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
    responses: Sequence[str],
    golds: Sequence[str],
    *,
    timeout_seconds: float = 2.0,
    workers: int = 2,
    numeric_tolerance: float = 0.0,
) -> list[MathVerdict]:
    """Compare the final answer of each response with its gold answer.

    Args:
        responses: What the policy wrote.
        golds: The gold answer to each.
        timeout_seconds: Time that one comparison may take in a worker before it is killed and scored 0.
        workers: Number of worker processes, started by the first comparison that needs one.
        numeric_tolerance: Relative distance up to which two numbers are equal; exactly equal by default.

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
    statuses = {pair: _decide(*pair, numeric_tolerance) for pair in dict.fromkeys(pairs)}
    undecided = [pair for pair, status in statuses.items() if status is None]
    if undecided:
        items = [(normalize(answer or ""), normalize(gold), numeric_tolerance) for answer, gold in undecided]
        found = _pool(workers).run(items, timeout_seconds)
        statuses.update(zip(undecided, cast(list[MathStatus], found), strict=True))
    return [MathVerdict(status=cast(MathStatus, statuses[pair]), answer=pair[0]) for pair in pairs]


def _decide(answer: str | None, gold: str, tolerance: float) -> MathStatus | None:
    """The verdict as far as it needs no worker; `None` where it needs one."""
    if why_ill_formed(gold) is not None:
        return "unparsable_gold"
    if answer is None:
        return "no_answer"
    try:
        verdict = Comparison(lambda *_: None, tolerance).agree(normalize(answer), normalize(gold))
    except Malformed:
        verdict = False
    return None if verdict is None else "correct" if verdict else "wrong"


_pools: dict[int, WorkerPool] = {}  # by number of workers


def _pool(workers: int) -> WorkerPool:
    return _pools.setdefault(workers, WorkerPool(workers))


def close_workers() -> None:
    """End all worker processes; the next comparison that needs one starts them anew."""
    for pool in list(_pools.values()):
        pool.close()


atexit.register(close_workers)  # else a worker that is being replaced at exit says so in a traceback
os.register_at_fork(after_in_child=_pools.clear)  # a forked process cannot use its parent's workers
