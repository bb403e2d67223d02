"""What the updates of an iteration learn from: rewards and advantages beside the rollouts, and their rows.

Shapes as in `batch.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, Rollouts, join, moved


@dataclass
class Outcomes:
    """What advantages are made of, all from before the iteration's first update."""

    rollouts: Rollouts
    rewards: Tensor  # [N], R in [0, 1]; 0 where there is no verdict
    verdicts: Tensor  # [N], bool; False where a verifier gave no verdict, so that the row teaches nothing
    value_logits: Tensor | None = None  # [N], `v` of a critic that reads prompts
    token_values: Tensor | None = None  # [N, T], V(s_t) of a critic that reads tokens, before it sees token t
    penalties: Tensor | None = None  # [N, T], β · KL estimate, where that is part of the reward
    greedy_rewards: Tensor | None = None  # [N], R of the greedy response to the same prompt
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def mask(self) -> Tensor:
        """`[N, T]`: the response tokens of the rows that have a verdict."""
        return self.rollouts.response_mask * self.verdicts[:, None]

    @property
    def penalized_rewards(self) -> Tensor:
        """`[N]`: `R` minus the response's penalties."""
        return (
            self.rewards
            if self.penalties is None
            else self.rewards - torch.where(self.mask.bool(), self.penalties, 0.0).sum(1)
        )


@dataclass
class Experience:
    """What the updates of one iteration learn from; frozen before the first of them."""

    rollouts: Rollouts
    rewards: Tensor  # [N], R in [0, 1]; 0 where there is no verdict
    advantages: Tensor  # [N], or [N, T] where each token has its own
    verdicts: Tensor  # [N], bool; False where a verifier gave no verdict, so that the row teaches nothing
    values: Tensor | None = None  # V of the critic before the updates: [N], or [N, T]
    targets: Tensor | None = None  # what V should have been, of the same shape

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def mask(self) -> Tensor:
        """`[N, T]`: the response tokens that the policy learns from."""
        return self.rollouts.response_mask * self.verdicts[:, None]

    @property
    def informative(self) -> list[int]:
        """The rows with a verdict and an advantage other than exactly 0: all that a policy gradient comes from."""
        moves = self.advantages.reshape(len(self), -1).ne(0).any(dim=1) if len(self) else self.verdicts
        return (moves & self.verdicts).nonzero().squeeze(1).tolist()

    def rows(self, index: Sequence[int], counts: bool = True) -> Experience:
        """The rows at `index`, in that order; without verdicts where they do not count."""
        picked = torch.as_tensor(index, dtype=torch.long, device=self.rewards.device)
        return Experience(
            self.rollouts.rows(index),
            self.rewards[picked],
            self.advantages[picked],
            self.verdicts[picked] & counts,
            None if self.values is None else self.values[picked],
            None if self.targets is None else self.targets[picked],
        )

    def to(self, device: torch.device | str) -> Experience:
        """The same on `device`."""
        return dataclasses.replace(self, rollouts=self.rollouts.to(device), **moved(self, device))

    @classmethod
    def concat(cls, parts: Sequence[Experience]) -> Experience:
        """The rows of `parts`, one part after the other; they no longer belong to one batch's prompts."""
        rollouts = Rollouts.concat([part.rollouts for part in parts], [-1] * sum(map(len, parts)))
        names = [entry.name for entry in dataclasses.fields(cls) if entry.name != "rollouts"]
        return cls(rollouts, **{name: join(name, [getattr(part, name) for part in parts]) for name in names})


Part = TypeVar("Part", Outcomes, Experience)


def teaching(part: Part, index: Sequence[int]) -> Part:
    """The same rows, of which only those at `index` keep a verdict that they have."""
    kept = torch.zeros_like(part.verdicts)
    kept[list(index)] = True
    return dataclasses.replace(part, verdicts=part.verdicts & kept)


@dataclass
class Replayed:
    """Prompts of earlier iterations that the critic sees again in one update."""

    prompts: list[Prompt]  # M
    token_ids: list[Sequence[int]]  # M unpadded prompts in the policy's ids
    targets: Tensor  # [M], float64, R
    ages: Tensor  # [M], float64, iterations since they were sampled
    weights: Tensor  # [M], float64; 0 for a row that only keeps a rank in step with the others

    def rows(self, index: Sequence[int], counts: bool = True) -> Replayed:
        """The rows at `index`, in that order; with weight 0 where they do not count."""
        picked = torch.as_tensor(index, dtype=torch.long, device=self.weights.device)
        return Replayed(
            [self.prompts[i] for i in index],
            [self.token_ids[i] for i in index],
            self.targets[picked],
            self.ages[picked],
            self.weights[picked] * counts,
        )


@dataclass
class MicroBatch:
    """The rows of one backward, and the critic's."""

    policy: Experience
    critic: Experience  # other rows: a prompt without its response is short, and each has a target
    replayed: Replayed | None  # what the critic sees again, if anything
    index: list[int]  # positions of the policy's rows in the mini-batch of this rank
    share: float  # 1 / (micro-batches of the mini-batch over all ranks)
    last: bool  # whether it is the last of its mini-batch
