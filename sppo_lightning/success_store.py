"""Where successes are kept, to be learned from again."""

from __future__ import annotations

import dataclasses
import math
import random
from array import array
from collections.abc import Collection, Iterable
from typing import Any

import torch

from sppo_lightning.batch import Prompt, PromptKey, Success


class SuccessStore:
    """A bounded list of different successes, those that were seen longest ago first.

    Every rank has the same one: it is told the successes of all ranks, and draws are keyed by seed and iteration.

    Args:
        capacity: Most successes.
        per_prompt: Most successes of one prompt.
        seed: Of the draws.
    """

    def __init__(self, capacity: int, per_prompt: int, seed: int) -> None:
        self.capacity = capacity
        self.per_prompt = per_prompt
        self.seed = seed
        self.stored: list[Success] = []
        self.iteration = 0  # the present one, counted from 0

    def add(self, successes: Iterable[Success]) -> None:
        """Keep an iteration's successes, of all ranks in any order; what was seen longest ago makes room.

        One that is there already takes the new one's log-probabilities and age: it is seen again. A success with a
        log-probability that is not finite has no weight, and is left out.
        """
        for success in sorted(successes, key=_content):
            if not math.isfinite(sum(success.log_probs)):
                continue
            new = dataclasses.replace(
                success,
                prompt_ids=array("q", success.prompt_ids),
                response_ids=array("q", success.response_ids),
                log_probs=array("d", success.log_probs),
                iteration=self.iteration,
            )
            own = [old for old in self.stored if old.prompt.key == new.prompt.key]
            again = [old for old in own if old.response_ids == new.response_ids]
            gone = again or own[: max(len(own) + 1 - self.per_prompt, 0)]
            self.stored = [*(old for old in self.stored if old not in gone), new][-self.capacity :]

    def retire(self, keys: Collection[PromptKey]) -> int:
        """Forget the successes of these prompts; how many there were."""
        before = len(self.stored)
        self.stored = [success for success in self.stored if success.prompt.key not in keys]
        return before - len(self.stored)

    def draw(self, rows: int) -> list[Success]:
        """At most so many different ones, evenly, the same whenever it is asked in one iteration."""
        generator = random.Random(f"{self.seed} {self.iteration}")
        chosen = generator.sample(range(len(self.stored)), min(rows, len(self.stored)))
        return [self.stored[i] for i in sorted(chosen)]

    def state_dict(self) -> dict[str, Any]:
        """The successes and the iteration, in types that load without the right to run code."""
        rows = [
            {entry.name: getattr(success, entry.name) for entry in dataclasses.fields(Success)}
            | {"prompt": success.prompt.plain()}
            | {name: torch.tensor(getattr(success, name)) for name in ("prompt_ids", "response_ids")}
            | {"log_probs": torch.tensor(success.log_probs, dtype=torch.float64)}
            for success in self.stored
        ]
        return {"iteration": self.iteration, "stored": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved, on any number of ranks."""
        self.iteration = state_dict["iteration"]
        self.stored = [
            Success(
                **row
                | {"prompt": Prompt(**row["prompt"])}
                | {name: array("q", row[name].tolist()) for name in ("prompt_ids", "response_ids")}
                | {"log_probs": array("d", row["log_probs"].tolist())}
            )
            for row in state_dict["stored"]
        ]


def _content(success: Success) -> tuple[Any, ...]:
    """What the order of an iteration's successes goes by, whichever rank has them."""
    return success.prompt.key, [*success.response_ids], success.log_excess, [*success.log_probs]
