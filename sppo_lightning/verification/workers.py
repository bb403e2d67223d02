"""Worker processes that may hang, crash or eat memory without harm to the trainer.

A worker imports this module and math-verify, never torch: it starts in milliseconds, forked from a server
process that has math-verify loaded, and is killed when an item outlives its time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import SimpleNamespace
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from sppo_lightning.verification.comparison import Comparison
from sppo_lightning.verification.symbolic import UnreadableGold, equal

MEMORY_BYTES = 2 * 1024**3  # what a worker may map on top of what it has mapped when it is ready
TASKS_PER_WORKER = 500  # then it is replaced, because sympy's caches only grow


class WorkerPool:
    """Processes that run `check`, started by the first item and shared by all threads.

    Args:
        workers: Number of processes.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None

    def run(self, items: Sequence[tuple[str, str, float]], timeout_seconds: float) -> list[str]:
        """The status of each (answer, gold, tolerance), as `check` says it, or "timeout" or "crashed".

        An item's time starts when a ready worker takes it; the worker is killed when it is up.
        """
        futures = [self._schedule(item, timeout_seconds) for item in items]
        return [self._status(future) for future in futures]

    def close(self) -> None:
        """End the processes; the next item starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _schedule(self, item: tuple[str, str, float], timeout_seconds: float) -> ProcessFuture:
        with self._lock:
            if self._pool is None or not self._pool.active:
                context = _Context()
                context.set_forkserver_preload([__name__, "math_verify", "latex2sympy2_extended"])
                self._pool = ProcessPool(self.workers, TASKS_PER_WORKER, _start_worker, context=context)
            return self._pool.schedule(check, args=item, timeout=timeout_seconds)

    @staticmethod
    def _status(future: ProcessFuture) -> str:
        try:
            return future.result()
        except TimeoutError:
            return "timeout"
        except (ProcessExpired, BrokenProcessPool, CancelledError):
            return "crashed"


class _Process(ForkServerProcess):
    """A child that does not run the main module again, which would load torch or start a second run."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        with _unimportable_main():
            return ForkServerProcess._Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process


@contextlib.contextmanager
def _unimportable_main() -> Iterator[None]:
    """Name the main module as a package's `__main__`, the one kind that children never import."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    main.__spec__ = SimpleNamespace(name=f"{__package__}.__main__")  # type: ignore[assignment]
    try:
        yield
    finally:
        main.__spec__ = spec


def _start_worker() -> None:
    """Make a new process ready: math-verify loaded and warm, memory bounded, bound to the trainer's life."""
    # pebble's own handler waits for the interpreter, which one big integer can hold for hours
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    check(r"\sqrt{2}x", r"\sqrt{3}x", 0.0)
    if sys.platform == "linux":
        _die_with_parent()
        _limit_resources()


def _die_with_parent() -> None:
    """Have the kernel end this process when the trainer is gone, whatever Python is busy with."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only ever called in a child
    sentinel = parent.sentinel  # a pipe whose other end the trainer alone holds
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_resources() -> None:
    import resource

    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)  # nothing of a response is ever printed
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def check(answer: str, gold: str, tolerance: float) -> str:
    """Whether an answer is the gold answer, both as canonical text. Runs in a worker.

    Returns:
        "correct", "wrong", "unparsable_gold", or "timeout" where the memory ran out; never a parsed object,
        whose printing or pickling alone can hang.
    """
    try:
        rules = Comparison(lambda left, right: equal(left, right, tolerance), tolerance)
        return "correct" if rules.agree(answer, gold) else "wrong"
    except UnreadableGold:
        return "unparsable_gold"
    except MemoryError:
        return "timeout"
    except Exception:  # whatever sympy raises on it, it was not shown to be right
        return "wrong"
