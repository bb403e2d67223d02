"""Advantages: how much better a response did than was expected of its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.batch import Rollouts


class Advantage(ABC):
    """Turns rewards and the critic's values into advantages; owns its settings and calls `functional`."""

    needs_critic: bool = False

    @abstractmethod
    def __call__(self, rollouts: Rollouts, rewards: Tensor, values: Tensor | None) -> Tensor:
        """Advantages `[N]`, one per response.

        Args:
            rollouts: The responses; `prompt_index` says which share a prompt.
            rewards: `R`, `[N]`, in [0, 1]; rows without a verdict hold 0 and are masked later.
            values: The critic's value logits `v`, `[N]`; None without a critic.
        """


class SequenceAdvantage(Advantage):
    """SPPO: `A = R − sigmoid(v)`, the same for every token, without whitening (paper, equation 9)."""

    needs_critic = True

    def __call__(self, rollouts: Rollouts, rewards: Tensor, values: Tensor | None) -> Tensor:
        """`[N]`; see `Advantage`."""
        assert values is not None
        return functional.sequence_advantage(rewards, values)
