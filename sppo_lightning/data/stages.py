"""Prompts from easy to hard, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sppo_lightning.batch import Prompt
from sppo_lightning.data.curriculum import WeightedCurriculum, check_positive, check_share
from sppo_lightning.errors import InputError, nearest, shortened


class StagedCurriculum(WeightedCurriculum):
    """Draws from the easiest prompts first, and from the next stage's once the present ones are mastered.

    Prompts of later stages do not come; those of earlier ones keep a share. The pass rate that decides is a running
    mean over the responses to prompts of the present stage, since it began. A stage's share rises step by step: on
    prompts that are suddenly all harder than any before, V is too high, so every response would be pushed down.

    Args:
        column: The column of the data with each prompt's difficulty, a number; the prompt's length in characters
            where left out.
        stages: How many, of as equal sizes as prompts of the same difficulty allow, which stay together; or the
            greatest difficulty of each stage but the last, such as `[2, 4]` for three.
        threshold: The pass rate above which the next stage begins.
        min_iterations: Iterations that a stage lasts at least.
        ramp_iterations: Iterations until a new stage has its whole share; 0 gives it at once.
        earlier_share: The share of the draws that is spread evenly over the earlier stages' prompts.
        running_decay: What is left of the pass rate's sums after an iteration.
    """

    remembered = (*WeightedCurriculum.remembered, "stage", "stage_iterations", "rewards", "responses")

    def __init__(
        self,
        column: str | None = None,
        stages: int | list[float] = 4,
        threshold: float = 0.7,
        min_iterations: int = 5,
        ramp_iterations: int = 10,
        earlier_share: float = 0.2,
        running_decay: float = 0.9,
    ) -> None:
        self.count = len(stages) + 1 if isinstance(stages, list) else stages
        if self.count < 2:
            raise InputError(
                f"`StagedCurriculum.stages`={stages} leaves nothing to advance to; use 2 or more, or leave "
                "`data.curriculum` out."
            )
        if isinstance(stages, list) and stages != sorted(set(stages)):
            raise InputError(f"`StagedCurriculum.stages`={stages} must rise from stage to stage; sort it.")
        check_share(self, "threshold", threshold, "the pass rate of a stage that is mastered, such as 0.7")
        check_share(self, "earlier_share", earlier_share, "the share of the stages before, such as 0.2")
        check_share(self, "running_decay", running_decay, "what is left after an iteration, such as 0.9")
        check_positive(self, "min_iterations", min_iterations, "1 or more, such as 5")
        if ramp_iterations < 0:
            raise InputError(f"`StagedCurriculum.ramp_iterations`={ramp_iterations} is below 0; use 0 or more.")
        self.column = column
        self.stages = stages
        self.threshold = threshold
        self.min_iterations = min_iterations
        self.ramp_iterations = ramp_iterations
        self.earlier_share = earlier_share
        self.running_decay = running_decay

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """See `Curriculum`; a stage without a prompt, or a first one that fills no batch, is refused too."""
        super().bind(prompts, batch_size, seed, shuffle)
        self.difficulties = np.array([self._difficulty(prompt) for prompt in prompts])  # [P]
        self.stage_of = np.searchsorted(self._greatest(), self.difficulties)  # [P], of each prompt, counted from 0
        sizes = np.bincount(self.stage_of, minlength=self.count)
        if sizes.min() == 0 or sizes[0] < batch_size:
            raise InputError(
                f"`StagedCurriculum.stages`={self.stages} gives stages of {', '.join(map(str, sizes))} prompts, "
                f"and none may be empty, nor the first too small for a batch of {batch_size}; use fewer stages."
            )
        self.stage = 0
        self.stage_iterations = 0  # that the stage has lasted
        self.rewards = self.responses = 0.0  # running sums, of which the stage's pass rate is the quotient

    def _greatest(self) -> np.ndarray:
        """The greatest difficulty of each stage but the last."""
        if isinstance(self.stages, list):
            return np.array(self.stages)
        ordered, count = np.sort(self.difficulties), len(self.prompts)
        return np.array([ordered[-(-k * count // self.stages) - 1] for k in range(1, self.stages)])

    def probabilities(self) -> np.ndarray:
        """`[P]`: even within the stage, within the earlier stages together, and 0 in the later ones."""
        present, earlier = self.stage_of == self.stage, self.stage_of < self.stage
        risen = min(1.0, (self.stage_iterations + 1) / (self.ramp_iterations + 1))
        share = 1 - risen * (1 - self.earlier_share) if self.stage else 0.0
        return (1 - share) * present / present.sum() + share * earlier / max(earlier.sum(), 1)

    def observe(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        """Count the stage's outcomes, and go to the next one when it is time; see `Curriculum`."""
        super().observe(positions, rewards)
        own = rewards[self.stage_of[positions] == self.stage]
        self.rewards = self.running_decay * self.rewards + float(own.sum())
        self.responses = self.running_decay * self.responses + len(own)
        self.stage_iterations += 1
        mastered = self.stage_iterations >= self.min_iterations and self.pass_rate > self.threshold
        if mastered and self.stage < self.count - 1:
            self.stage, self.stage_iterations, self.rewards, self.responses = self.stage + 1, 0, 0.0, 0.0

    @property
    def pass_rate(self) -> float:
        """The running pass rate of the stage; 0 before its first outcome."""
        return self.rewards / self.responses if self.responses else 0.0

    def describe(self, positions: np.ndarray) -> dict[str, float]:
        """The stage, its pass rate so far, the mean difficulty and the share of each stage."""
        figures = {"stage": float(self.stage), "stage_pass_rate": self.pass_rate}
        if len(positions):
            figures["difficulty"] = float(self.difficulties[positions].mean())
            counts = np.bincount(self.stage_of[positions], minlength=self.count)
            figures |= {f"share_stage_{i}": float(n / len(positions)) for i, n in enumerate(counts)}
        return figures

    def _difficulty(self, prompt: Prompt) -> float:
        if self.column is None:
            return float(len(prompt.text))
        value: Any = prompt.metadata.get(self.column)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            near = "" if self.column in prompt.metadata else nearest(self.column, prompt.metadata)
            found = "is missing" if value is None else f"is {shortened(value)}"
            raise InputError(
                f"`StagedCurriculum.column`={self.column} {found} in row {prompt.row} of {prompt.dataset}, where a "
                f"number must be{near}; name a column of numbers."
            )
        return number
