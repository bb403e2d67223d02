"""Policy objectives: what the update minimises, given log-probabilities and advantages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from sppo_lightning import functional

Stats = dict[str, Tensor]  # detached scalars of one micro-batch


class Objective(ABC):
    """A policy loss; owns its settings and calls `functional`."""

    needs_reference: bool = False  # whether the ratio is taken against the reference policy

    @abstractmethod
    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Stats]:
        """The loss of these rows, as their share of the whole mini-batch's.

        Args:
            log_probs: `[N, T]`, nats, with gradient.
            old_log_probs: `[N, T]`, nats, of the policy in the ratio's denominator.
            advantages: `[N]`.
            mask: `[N, T]`, 1.0 on response tokens.
            denominator: Tokens or sequences (`denominator_unit`) of the mini-batch over all micro-batches and
                ranks.

        Returns:
            A scalar that adds up over micro-batches, and statistics.
        """

    @property
    @abstractmethod
    def denominator_unit(self) -> Literal["tokens", "sequences"]:
        """What the loss is divided by."""


class TokenClipObjective(Objective):
    """PPO's clipped objective with one ratio per token and dual clip (paper, equation 10).

    Args:
        clip_low: The ratio is clipped below at `1 − clip_low`.
        clip_high: The ratio is clipped above at `1 + clip_high`.
        dual_clip: For negative advantages the loss is at most `−dual_clip · A`.
        aggregation: How token losses become one number.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float = 3.0,
        aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean",
    ) -> None:
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip
        self.aggregation = aggregation

    @property
    def denominator_unit(self) -> Literal["tokens", "sequences"]:
        """Tokens for `token-mean`, sequences otherwise."""
        return "tokens" if self.aggregation == "token-mean" else "sequences"

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Stats]:
        """See `Objective`."""
        token_losses, stats = functional.token_clip_objective(
            log_probs,
            old_log_probs,
            advantages[:, None] * mask,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        return functional.aggregate(token_losses, mask, self.aggregation, denominator), stats


class SequenceClipObjective(Objective):
    """One ratio for the whole response, clipped once (the article; length-normalised as in GSPO).

    Args:
        clip_low: The ratio is clipped below at `1 − clip_low`.
        clip_high: The ratio is clipped above at `1 + clip_high`.
        normalize: `length` takes the geometric mean of the token ratios, `none` their product.
        against: The ratio's denominator: the policy that sampled (`behaviour`) or the `reference` policy.
    """

    denominator_unit = "sequences"

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalize: Literal["length", "none"] = "length",
        against: Literal["behaviour", "reference"] = "behaviour",
    ) -> None:
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.normalize = normalize
        self.needs_reference = against == "reference"

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Stats]:
        """See `Objective`."""
        losses, stats = functional.sequence_clip_objective(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            normalize=self.normalize,
        )
        return losses.sum() / denominator, stats
