"""Things that take a while to start, started ahead by a thread of their own while others are in use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Spares(Generic[T]):
    """Keeps a few started, each of which is taken once.

    One thread starts all of them and lives until `close`: a process that dies with its parent dies with the thread
    that started it.

    Args:
        start: Starts one.
        end: Ends one that was not taken.
        number: How many are wanted in all; there are never more.
        spare: How many may wait at a time.
    """

    def __init__(self, start: Callable[[], T], end: Callable[[T], object], number: int, spare: int) -> None:
        self._start, self._end, self._spare = start, end, spare
        self._wanted, self._promised = number, 0  # still to be started, and to be taken by who waits
        self._waiting: deque[T | BaseException] = deque()
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="sandbox-spares")
        self._thread.start()

    def take(self) -> T | None:
        """One that has been started, or will be in a moment; None where all that were wanted have been taken.

        Raises:
            BaseException: What starting it raised.
        """
        with self._change:
            if self._wanted + len(self._waiting) - self._promised <= 0:
                return None
            self._promised += 1
            self._change.notify_all()
            self._change.wait_for(lambda: self._waiting or self._closed)
            self._promised -= 1
            if not self._waiting:
                return None
            found = self._waiting.popleft()
            self._change.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End those that nobody took; the others should have been done with."""
        with self._change:
            self._closed, self._wanted = True, 0
            self._change.notify_all()
        self._thread.join()
        while self._waiting:
            left = self._waiting.popleft()
            if not isinstance(left, BaseException):
                self._end(left)

    def _is_short(self) -> bool:
        return self._wanted > 0 and len(self._waiting) < self._spare + self._promised

    def _fill(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._is_short())
                if self._closed:
                    break
            try:
                found: T | BaseException = self._start()
            except BaseException as error:  # who takes it is told
                found = error
            with self._change:
                self._waiting.append(found)
                self._wanted = max(self._wanted - 1, 0)
                self._change.notify_all()
