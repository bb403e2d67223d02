"""The embedded task: chains of labelled arithmetic modulo ten, solved one step at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, Literal

from sppo_lightning.data.sources import PromptSource
from sppo_lightning.errors import InputError

LABELS = "abcdefghijklmnopqrst"


class ChainTask(PromptSource):
    r"""Chains of labelled operations modulo 10, generated on the fly; longer chains are harder.

    The prompt `9 a +3 b +1 ;` is answered by `a 9 +3 = 2 b 2 +1 = 3 ; \boxed{ 3 }`: each step copies its
    label, recalls the running value, copies the operation and computes. Prompts of the two splits are disjoint.

    With `answer: solution` nothing but the whole worked solution is right, so the chance of an answer by luck falls
    with every step: a reward as sparse as one likes. Verify it with `ExactMatch(extract="whole")`.

    With `slips`, the worked solutions are a careless pupil's: `slips: {3: 0.6}` has 6 in 10 of the steps `+3` come
    out one too low, and go on from there. Whoever imitates them makes the same mistakes; answers are always right.

    Args:
        operations: Chain lengths and their shares, such as `{2-5: 0.9, 6-10: 0.1}`.
        size: Number of prompts.
        split: `train` or `validation`; a prompt belongs to one of them, decided by its hash.
        seed: Decides which prompts are drawn.
        max_operand: Operands are drawn from 1 to this, at most 9; more of them take longer to learn.
        demonstrations: Give every prompt its worked solution, for the supervised warm start.
        slips: Chance, by operand, that a worked solution gets a step with it wrong.
        answer: What is right: the last `value`, or the whole `solution`.
    """

    def __init__(
        self,
        operations: dict[str, float],
        size: int,
        split: Literal["train", "validation"] = "train",
        seed: int = 0,
        max_operand: int = 3,
        demonstrations: bool = False,
        slips: dict[int, float] | None = None,
        answer: Literal["value", "solution"] = "value",
    ) -> None:
        self.ranges = [_parse_range(text) for text in operations]
        self.shares = list(operations.values())
        self.size = size
        self.split = split
        self.seed = seed
        self.max_operand = max_operand
        self.demonstrations = demonstrations
        self.slips = slips or {}
        self.answer = answer
        if any(not 0 <= chance <= 1 for chance in self.slips.values()):
            raise InputError(f"`slips`={self.slips} of ChainTask holds what is no chance; use numbers from 0 to 1.")
        if not 1 <= max_operand <= 9:
            raise InputError(f"`max_operand`={max_operand} of ChainTask is no digit; use 1 to 9.")
        if size < 1 or not operations or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise InputError(f"ChainTask with `size`={size} and `operations`={operations} has no prompts to draw.")

    @property
    def origin(self) -> str:
        """The task's settings, for error messages."""
        return f"ChainTask(split={self.split}, seed={self.seed})"

    def rows(self) -> list[Mapping[str, Any]]:
        """Distinct prompts with their answer, the number of operations and, if asked for, a demonstration."""
        rng = random.Random(f"{self.seed}|{self.split}")
        found: dict[str, Mapping[str, Any]] = {}
        for _ in range(100 * self.size):
            low, high = rng.choices(self.ranges, self.shares)[0]
            row = self._chain(rng, rng.randint(low, high))
            if _split_of(row["prompt"]) == self.split and row["prompt"] not in found:
                found[row["prompt"]] = row if self.demonstrations else {**row, "demonstration": None}
                if len(found) == self.size:
                    return list(found.values())
        raise InputError(
            f"ChainTask found only {len(found)} distinct prompts for `size`={self.size}; lower it or add longer "
            "chains."
        )

    def _chain(self, rng: random.Random, operations: int) -> dict[str, Any]:
        true = written = rng.randrange(10)
        prompt, steps, solution = [str(true)], [], []
        for label in sorted(rng.sample(LABELS, operations)):
            operand = rng.randint(1, self.max_operand)
            slip = int(rng.random() < self.slips[operand]) if operand in self.slips else 0
            prompt += [label, f"+{operand}"]
            before = true, written
            true, written = (true + operand) % 10, (written + operand - slip) % 10
            solution += [label, str(before[0]), f"+{operand}", "=", str(true)]
            steps += [label, str(before[1]), f"+{operand}", "=", str(written)]
        return {
            "prompt": " ".join([*prompt, ";"]),
            "answer": str(true) if self.answer == "value" else _worked(solution),
            "demonstration": _worked(steps),
            "operations": operations,
        }


def _worked(steps: list[str]) -> str:
    return " ".join([*steps, ";", r"\boxed{", steps[-1], "}"])


def _split_of(prompt: str) -> str:
    digest = hashlib.blake2b(prompt.encode(), digest_size=2).digest()
    return "validation" if digest[0] % 8 == 0 else "train"


def _parse_range(text: str) -> tuple[int, int]:
    low, _, high = str(text).partition("-")
    try:
        numbers = int(low), int(high or low)
    except ValueError:
        raise InputError(f"`operations` of ChainTask has the key {text!r}; write a range such as 2-5.") from None
    if not 1 <= numbers[0] <= numbers[1] <= len(LABELS):
        raise InputError(f"`operations` of ChainTask has the range {text!r}; it must lie within 1-{len(LABELS)}.")
    return numbers
