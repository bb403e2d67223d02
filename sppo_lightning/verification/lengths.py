"""What a response's length costs or pays: curves over tokens, for `LengthPenalty`."""

from __future__ import annotations

import math
from typing import ClassVar

from sppo_lightning.errors import InputError


class LengthCurve:
    """A number for a response of some length; a subclass owns its arguments and writes `value`."""

    needs_correct: ClassVar[bool] = False  # whether the number depends on `correct`

    def value(self, tokens: int, max_tokens: int, correct: bool) -> float:
        """The shaping score of one response.

        Args:
            tokens: Its length, the end of sequence included.
            max_tokens: The longest length, at least 1; `tokens` may be beyond it.
            correct: Whether it has full marks; False throughout unless `needs_correct`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define value().")

    def check(self, max_tokens: int) -> None:
        """Raise `InputError` where the arguments do not go with a longest length of `max_tokens`."""


class Linear(LengthCurve):
    """From 0 for no tokens down to −1 at the longest length, and −1 beyond."""

    def value(self, tokens: int, max_tokens: int, correct: bool) -> float:
        """From −1 to 0."""
        return -min(tokens / max_tokens, 1.0)


class Overlong(LengthCurve):
    r"""0 up to `max_response_tokens − buffer_tokens`, from there linear down to −1, and −1 beyond.

    Source: DAPO, arXiv 2503.14476, section 3.4, equation 13.

    Args:
        buffer_tokens: Length over which the penalty grows, in tokens, up to the longest length.
    """

    def __init__(self, buffer_tokens: int) -> None:
        self.buffer_tokens = buffer_tokens

    def check(self, max_tokens: int) -> None:
        """The buffer lies within the longest length."""
        if not 0 <= self.buffer_tokens <= max_tokens:
            raise InputError(
                f"`Overlong.buffer_tokens`={self.buffer_tokens} is not within the {max_tokens} tokens of "
                "`max_response_tokens`; use a fifth of them."
            )

    def value(self, tokens: int, max_tokens: int, correct: bool) -> float:
        """From −1 to 0."""
        # without a buffer the first token beyond the limit costs it all
        left = (max_tokens - self.buffer_tokens - tokens) / max(self.buffer_tokens, 1)
        return min(max(left, -1.0), 0.0)


class Cosine(LengthCurve):
    r"""Half a cosine from the value of a short response to that of a long one, for correct and wrong ones apart.

    `long + (short − long) · (1 + cos(π · tokens / max_response_tokens)) / 2`, and `exceeded` from
    `max_response_tokens` on. A correct response is best short, a wrong one best long: it should have thought on.

    The source's values, 2 and 1 for correct, −10 and 0 for wrong ones and −10 beyond, are whole rewards. The
    defaults here come on top of an outcome of 1 or 0, and their wrong side is on the scale of that outcome.

    Source: Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv 2502.03373, section 4.

    Args:
        correct_short: Value of a correct response as its length goes to 0.
        correct_long: Value of a correct response as its length goes to the longest.
        wrong_short: Value of a wrong response as its length goes to 0.
        wrong_long: Value of a wrong response as its length goes to the longest.
        exceeded: Value of any response of the longest length or more.
    """

    needs_correct = True

    def __init__(
        self,
        correct_short: float = 1.0,
        correct_long: float = 0.0,
        wrong_short: float = -1.0,
        wrong_long: float = 0.0,
        exceeded: float = -1.0,
    ) -> None:
        self.correct_short, self.correct_long = correct_short, correct_long
        self.wrong_short, self.wrong_long = wrong_short, wrong_long
        self.exceeded = exceeded
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise InputError(f"`Cosine.{name}`={value} cannot be added to an advantage; use a finite number.")

    def value(self, tokens: int, max_tokens: int, correct: bool) -> float:
        """Between the values for short and long responses, or `exceeded`."""
        if tokens >= max_tokens:
            return self.exceeded
        short, long = (self.correct_short, self.correct_long) if correct else (self.wrong_short, self.wrong_long)
        return long + (short - long) * (1 + math.cos(math.pi * tokens / max_tokens)) / 2
