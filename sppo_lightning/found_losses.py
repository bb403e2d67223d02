"""How successes are learned from that are not an iteration's own responses; see `sppo_lightning.successes`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.errors import InputError


class FoundLoss(ABC):
    """The weight of each found response's log-likelihood, whose negative is minimised."""

    @abstractmethod
    def __call__(
        self, log_probs: Tensor, sampled: Tensor, mask: Tensor, advantages: Tensor, log_excess: Tensor
    ) -> Tensor:
        """Weights `[N]`, without gradient.

        Args:
            log_probs: `[N, T]`, nats, of the present policy.
            sampled: `[N, T]`, nats, of the policy that sampled the tokens.
            mask: `[N, T]`, 1.0 on response tokens.
            advantages: `[N]`, score less V.
            log_excess: `[N]`, nats: by how much the search raised each response's density.
        """

    def truncated(self, weights: Tensor, advantages: Tensor) -> Tensor:
        """Which of the weights `[N]` are as great as they get for these advantages, bool; none by default."""
        return torch.zeros_like(weights, dtype=torch.bool)


class Demonstrations(FoundLoss):
    """Imitates what was found, however unlikely it was: expert iteration, arXiv 1705.08439."""

    def __call__(
        self, log_probs: Tensor, sampled: Tensor, mask: Tensor, advantages: Tensor, log_excess: Tensor
    ) -> Tensor:
        """1 for each."""
        return torch.ones_like(advantages)


class OffPolicySamples(FoundLoss):
    """A policy gradient from samples of another density `q`: `A · min(π / q, max_weight)`.

    It is added to the first update of an iteration, where `π` is `π_old`, so no ratio is clipped yet. A searched
    success that the policy would hardly ever sample weighs as little as it would be rare.

    Source: truncated importance sampling, Ionides 2008.

    Args:
        max_weight: Greatest weight.
    """

    def __init__(self, max_weight: float = 2.0) -> None:
        if not max_weight > 0:
            raise InputError(f"`OffPolicySamples.max_weight`={max_weight} teaches nothing; use more than 0.")
        self.max_weight = max_weight

    def __call__(
        self, log_probs: Tensor, sampled: Tensor, mask: Tensor, advantages: Tensor, log_excess: Tensor
    ) -> Tensor:
        """`A · min(π / q, max_weight)`, the ratio being that of the whole response."""
        # spread over the tokens, of which only the sum counts
        proposal = sampled + (log_excess / mask.sum(1).clamp(min=1.0))[:, None] * mask
        weights = functional.truncated_importance_weights(
            log_probs.detach(), proposal, mask, self.max_weight, "sequence"
        )
        return advantages * weights.amax(dim=1)

    def truncated(self, weights: Tensor, advantages: Tensor) -> Tensor:
        """Those of ratios above `max_weight`; none where the advantage is 0."""
        return (weights >= self.max_weight * advantages) & (advantages > 0)
