"""Critic replay: the critic learns again from the prompts and outcomes of earlier iterations."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Experience, Replayed
from sppo_lightning.ranks import gather_objects, rank_and_ranks


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """A prompt and what became of one response to it."""

    prompt: Prompt
    token_ids: Sequence[int]  # of the prompt, in the policy's ids
    target: float  # R
    iteration: int  # in which it was sampled, counted from 0


class CriticReplay:
    """In each update the critic sees stored prompts again, besides the update's own.

    Their loss is the mean of the binary cross-entropies, weighted by `0.5 ** (age / half_life_iterations)` because
    the policy has moved on since, and is added to the loss on the update's own prompts. Rows are drawn evenly and
    without replacement, by a generator keyed by seed, rank and update, so that a resumed run draws what the
    undisturbed one would. Each rank keeps the rows that it sampled.

    Args:
        capacity: Outcomes that each rank keeps; the oldest go first.
        ratio: Replayed prompts per sequence of the update; fewer while the store is filling.
        half_life_iterations: Iterations after which a row counts half as much.
        seed: Of the draws.
    """

    def __init__(
        self, capacity: int = 4096, ratio: float = 1.0, half_life_iterations: float = 8.0, seed: int = 0
    ) -> None:
        for name, value in (
            ("capacity", capacity),
            ("ratio", ratio),
            ("half_life_iterations", half_life_iterations),
        ):
            if not value > 0:
                raise InputError(
                    f"`CriticReplay.{name}`={value} replays nothing; use more than 0, or leave `critic_replay` out."
                )
        self.ratio = ratio
        self.half_life_iterations = half_life_iterations
        self.seed = seed
        self.stored: deque[StoredOutcome] = deque(maxlen=capacity)
        self.iteration = 0  # the present one, counted from 0

    def draw(self, update: Experience, number: int) -> Replayed:
        """What the critic sees again in an update, the run's `number`-th.

        From an empty store it is the update's first prompt with weight 0, so that ranks stay in step.
        """
        device = update.rewards.device
        size = min(round(self.ratio * len(update)), len(self.stored))
        rank, _ = rank_and_ranks()
        chosen = random.Random(f"{self.seed} {rank} {number}").sample(range(len(self.stored)), size)
        rows = [self.stored[i] for i in sorted(chosen)]
        ages = torch.tensor([self.iteration - row.iteration for row in rows], dtype=torch.float64, device=device)
        weights = 0.5 ** (ages / self.half_life_iterations)
        if not rows:
            rows = self._outcomes(update, [0])
            ages = weights = torch.zeros(1, dtype=torch.float64, device=device)
        targets = torch.tensor([row.target for row in rows], dtype=torch.float64, device=device)
        return Replayed([row.prompt for row in rows], [row.token_ids for row in rows], targets, ages, weights)

    def store(self, experience: Experience) -> None:
        """Keep an iteration's outcomes, after its updates: they must not be replayed while they are fresh."""
        self.stored.extend(self._outcomes(experience, experience.verdicts.nonzero().squeeze(1).tolist()))
        self.iteration += 1

    def _outcomes(self, experience: Experience, index: Sequence[int]) -> list[StoredOutcome]:
        rollouts, targets = experience.rollouts, experience.targets
        assert targets is not None
        return [
            StoredOutcome(
                rollouts.prompts[i],
                array("q", rollouts.prompt_ids[i][rollouts.prompt_mask[i] > 0].tolist()),
                targets[i].item(),
                self.iteration,
            )
            for i in index
        ]

    def state_dict(self) -> dict[str, Any]:
        """The stores of all ranks and the iteration, in plain types; a collective."""
        own = [(row.prompt.plain(), [*row.token_ids], row.target, row.iteration) for row in self.stored]
        return {"iteration": self.iteration, "stored": gather_objects(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved; where the number of ranks is another, rows are dealt anew by age."""
        rank, ranks = rank_and_ranks()
        parts = state_dict["stored"]
        if len(parts) == ranks:
            own = parts[rank]
        else:
            own = sorted((row for part in parts for row in part), key=lambda row: row[3])[rank::ranks]
        self.stored.clear()
        self.stored.extend(StoredOutcome(Prompt(**p), array("q", ids), r, i) for p, ids, r, i in own)
        self.iteration = state_dict["iteration"]
