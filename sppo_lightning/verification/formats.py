"""Whether a response has the form asked for: patterns that match or must not, and a block of thought."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import regex  # not `re`, which can neither be stopped nor lets another thread run

FormatStatus = Literal["met", "broken", "timeout"]

MAX_CHARACTERS = 1_000_000  # of a response; longer ones are broken unread
_OPEN, _CLOSE = "<think>", "</think>"


class ResponseFormat:
    """What a response must look like.

    Args:
        require: Regular expressions of which each must match somewhere in the response.
        forbid: Regular expressions of which none may.
        think: Whether a response must begin with one block of thought, see `thinks_first`.

    Raises:
        ValueError: Where a text is no regular expression, as (name of the argument, the text, what is wrong).
    """

    def __init__(self, require: Sequence[str] = (), forbid: Sequence[str] = (), think: bool = False) -> None:
        self.require = [_compiled("require", pattern) for pattern in require]
        self.forbid = [_compiled("forbid", pattern) for pattern in forbid]
        self.think = think

    def check(self, response: str, opened: bool = False, timeout_seconds: float = 0.2) -> FormatStatus:
        """Whether a response has this form.

        Args:
            response: The whole response.
            opened: Whether its prompt ends with `<think>`.
            timeout_seconds: For all patterns together; what cannot be told by then is no form.
        """
        if len(response) > MAX_CHARACTERS or (self.think and not thinks_first(response, opened)):
            return "broken"
        deadline = time.monotonic() + timeout_seconds
        try:
            for patterns, wanted in ((self.require, True), (self.forbid, False)):
                for pattern in patterns:
                    left = max(deadline - time.monotonic(), 1e-3)
                    found = pattern.search(response, timeout=left, concurrent=True)
                    if (found is not None) != wanted:
                        return "broken"
        except TimeoutError:
            return "timeout"
        return "met"


def thinks_first(response: str, opened: bool = False) -> bool:
    """Whether a response is one `<think>…</think>` that is not empty, and then an answer that is not empty.

    Where its prompt ends with `<think>` (`opened`), as some chat templates have it, it starts inside the block.
    """
    thought, closed, answer = response.strip().partition(_CLOSE)
    if not opened:
        if not thought.startswith(_OPEN):
            return False
        thought = thought.removeprefix(_OPEN)
    tags = (tag in part for part in (thought, answer) for tag in (_OPEN, _CLOSE))
    return bool(closed and thought.strip() and answer.strip()) and not any(tags)


def is_opened(prompt: str) -> bool:
    """Whether a prompt ends with `<think>`, white space aside."""
    return prompt.rstrip().endswith(_OPEN)


def _compiled(name: str, pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(name, pattern, str(error)) from error
