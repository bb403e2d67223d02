"""Where each rank is: so that one that the others wait for in vain is named, with what it is doing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from sppo_lightning.ranks import rank_and_ranks

_MISSED = ("timed out", "timeout", "connection closed by peer", "connection reset by peer", "broken pipe")
_LOOKS = 20  # of a watch, within the time that ranks wait for each other
_KEY = "sppo_lightning/whereabouts/{}"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Surrounds work in which ranks meet, and lets the others know that this rank is in it.

    Raises:
        RuntimeError: the ranks have not met in time, or one is gone; it says where each of them is.
    """
    _tell(f"in {name}")
    try:
        yield
    except RuntimeError as error:
        if rank_and_ranks()[1] == 1 or not any(word in str(error).lower() for word in _MISSED):
            raise
        raise RuntimeError(f"The ranks have not met in {name}: {whereabouts()}.") from error
    _tell(f"behind {name}")


def whereabouts() -> str:
    """Where each rank was last, and for how long it has been there."""
    found = []
    for rank in range(rank_and_ranks()[1]):
        told = ""
        with suppress(RuntimeError):  # rank 0, which keeps the store, is gone
            told = _store().get(_KEY.format(rank)).decode() if _store().check([_KEY.format(rank)]) else ""
        since, _, where = told.partition(" ")
        found.append(
            f"rank {rank} is {where} for {time.time() - float(since):.0f} s" if told else f"rank {rank} is gone"
        )
    return ", ".join(found)


class Watch:
    """A thread that says where the ranks are, shortly before they stop waiting for each other.

    For NCCL, whose own watchdog ends the process without an exception that `phase` could explain.

    Args:
        timeout_seconds: How long ranks wait for each other in a collective.
        say: Takes the sentence.
    """

    def __init__(self, timeout_seconds: float, say: Callable[[str], Any]) -> None:
        self.timeout_seconds, self.say = timeout_seconds, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="whereabouts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        said: float | None = None
        while not self._ended.wait(self.timeout_seconds / _LOOKS):
            since = _told_at
            if since not in (None, said) and time.time() - since > self.timeout_seconds * (1 - 3 / _LOOKS):
                self.say(f"A rank that has waited for long: {whereabouts()}.")
                said = since


_told_at: float | None = None


def _tell(where: str) -> None:
    global _told_at
    rank, ranks = rank_and_ranks()
    if ranks > 1:
        _told_at = time.time()
        with suppress(RuntimeError):
            _store().set(_KEY.format(rank), f"{_told_at} {where}")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
