"""Scores that are worked out while other responses are still sampled."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sppo_lightning.batch import Rollouts

_Key = tuple[str, int, str, str]  # what a score depends on: data set, row, response and why it ended


@dataclass
class _Group:
    """Scores of some responses, and what was counted meanwhile."""

    scores: list[float | None]
    counts: Counter[str]
    first_traceback: str


class EarlyScores:
    """Scores a verifier's responses in a thread of its own, those that are asked for early before the others.

    All of the verifier's scoring goes through the one thread, so it is never asked twice at once.

    Args:
        verifier: Whose `score_rollouts` is called, on a copy with counts of its own.
    """

    def __init__(self, verifier: Any) -> None:
        self.verifier = verifier
        self._asked: dict[_Key, tuple[Future[_Group], int]] = {}  # and the response's place in its group
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def ask(self, rollouts: Rollouts) -> None:
        """Score these responses when there is time; `complete` asks for them again."""
        group = self._submit(rollouts)
        with self._lock:
            self._asked |= {key: (group, place) for place, key in enumerate(_keys(rollouts))}

    def complete(self, rollouts: Rollouts) -> Sequence[float | None]:
        """The scores of all these responses; raises what `score_rollouts` raises for one that is scored now.

        A group that failed early is scored again, for its failures to be told apart and counted as always.
        """
        keys = _keys(rollouts)
        with self._lock:
            asked = [self._asked.pop(key, None) for key in keys]
        scores: list[float | None] = [None] * len(keys)
        rest: list[int] = []
        counted: set[Future[_Group]] = set()
        for row, found in enumerate(asked):
            if found is None or found[0].exception() is not None:
                rest.append(row)
                continue
            future, place = found
            scores[row] = future.result().scores[place]
            if future not in counted:
                counted.add(future)
                self._count(future.result())
        if len(rest) == len(keys):
            return self._now(rollouts)
        if rest:
            for row, score in zip(rest, self._now(rollouts.rows(rest)), strict=True):
                scores[row] = score
        return scores

    def close(self) -> None:
        """End the thread and forget what was asked for."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._asked = None, {}

    def _now(self, rollouts: Rollouts) -> list[float | None]:
        group = self._submit(rollouts).result()
        self._count(group)
        return group.scores

    def _submit(self, rollouts: Rollouts) -> Future[_Group]:
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"scores-{self.verifier.name}")
            return self._thread.submit(self._score, rollouts)

    def _score(self, rollouts: Rollouts) -> _Group:
        twin = copy.copy(self.verifier)
        twin.begin()  # its counts are joined when the scores are asked for
        return _Group(list(twin.score_rollouts(rollouts)), twin.counts, twin._first_traceback)

    def _count(self, group: _Group) -> None:
        self.verifier.counts.update(group.counts)
        self.verifier._first_traceback = self.verifier._first_traceback or group.first_traceback


def _keys(rollouts: Rollouts) -> list[_Key]:
    rows = zip(rollouts.prompts, rollouts.responses, rollouts.finish_reasons, strict=True)
    return [(prompt.dataset, prompt.row, response, why) for prompt, response, why in rows]
