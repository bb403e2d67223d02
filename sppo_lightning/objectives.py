"""What the update minimises: policy objectives, and the losses of a critic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.errors import InputError, check_option
from sppo_lightning.functional import Aggregation, RatioLevel, RatioNormalization

RatioDenominator = Literal["behaviour", "reference"]  # the policy that sampled, or the reference
Unit = Literal["tokens", "sequences"]  # what a loss is averaged over
Stats = dict[str, Tensor]  # detached scalars of one micro-batch


class Objective(ABC):
    """A policy loss; owns its settings and calls `functional`."""

    needs_reference: bool = False  # whether the ratio is taken against the reference policy
    is_importance_weighted: ClassVar[bool] = False  # whether the ratio is a weight, of whole distributions
    takes_token_advantages: ClassVar[bool] = True  # or one advantage per response alone

    @abstractmethod
    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Stats]:
        """The loss of these rows, as their share of the whole mini-batch's.

        Args:
            log_probs: `[N, T]`, nats, with gradient.
            old_log_probs: `[N, T]`, nats, of the policy in the ratio's denominator.
            advantages: `[N]`, or `[N, T]` where each token has its own.
            mask: `[N, T]`, 1.0 on response tokens.
            denominator: Tokens or sequences (`denominator_unit`) of the mini-batch over all micro-batches and
                ranks.

        Returns:
            A scalar that adds up over micro-batches, and statistics.
        """

    @property
    @abstractmethod
    def denominator_unit(self) -> Unit:
        """What the loss is divided by."""


class TokenObjective(Objective):
    """A loss per token; subclasses say which, and how their losses become one number is settled here.

    Args:
        aggregation: `token-mean` for the mean over all tokens of the mini-batch; `seq-mean-token-sum` and
            `seq-mean-token-mean` for the mean over responses of the sum, or the mean, over their tokens.
        constant_length: With `seq-mean-token-sum`, divide the sums by this number of tokens, the same for every
            response (Dr. GRPO: the longest response).
    """

    def __init__(self, aggregation: Aggregation = "token-mean", constant_length: int | None = None) -> None:
        check_option("aggregation", aggregation, Aggregation)
        if constant_length is not None and (constant_length < 1 or aggregation != "seq-mean-token-sum"):
            raise InputError(
                f"`constant_length`={constant_length} with `aggregation`={aggregation} cannot be used; it must be "
                "1 or more tokens and go with seq-mean-token-sum."
            )
        self.aggregation = aggregation
        self.constant_length = constant_length

    @property
    def denominator_unit(self) -> Unit:
        """Tokens for `token-mean`, sequences otherwise."""
        return "tokens" if self.aggregation == "token-mean" else "sequences"

    @abstractmethod
    def token_losses(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Stats]:
        """Losses `[N, T]` and statistics; `advantages` are `[N, T]`, or `[N, 1]` for one per response."""

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Stats]:
        """See `Objective`."""
        each = advantages if advantages.ndim == 2 else advantages[:, None]
        losses, stats = self.token_losses(log_probs, old_log_probs, each, mask)
        loss = functional.aggregate(losses, mask, self.aggregation, denominator)
        return loss / (self.constant_length or 1), stats


class TokenClipObjective(TokenObjective):
    """PPO's clipped objective with one ratio per token and dual clip: SPPO's own (arXiv 2604.08865).

    Args:
        clip_low: The ratio is clipped below at `1 − clip_low`.
        clip_high: The ratio is clipped above at `1 + clip_high`.
        dual_clip: For negative advantages the loss is at most `−dual_clip · A`.
        aggregation: `token-mean` for the mean over all tokens of the mini-batch; `seq-mean-token-sum` and
            `seq-mean-token-mean` for the mean over responses of the sum, or the mean, over their tokens.
        constant_length: With `seq-mean-token-sum`, divide the sums by this number of tokens (Dr. GRPO).
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float = 3.0,
        aggregation: Aggregation = "token-mean",
        constant_length: int | None = None,
    ) -> None:
        super().__init__(aggregation, constant_length)
        _check_clip(clip_low, clip_high)
        if not dual_clip > 1:
            raise InputError(f"`dual_clip`={dual_clip} is not above 1; use 3.0, or .inf for no bound.")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    def token_losses(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Stats]:
        """See `TokenObjective`."""
        return functional.token_clip_objective(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )


class ImportanceWeightedObjective(TokenObjective):
    """`−sg(truncated ratio) A log π`: a weight without gradient, so that no token is silenced.

    With the ratio per token, this is CISPO (arXiv 2506.13585); with the joint ratio of the response, truncated
    importance sampling, for responses of the reference or an older policy.

    Args:
        min_weight: Weights below are raised to this; 0 truncates from above alone.
        max_weight: Weights above are cut to this.
        level: `token` for a weight per token, `sequence` for one per response.
        aggregation: `token-mean` for the mean over all tokens of the mini-batch; `seq-mean-token-sum` and
            `seq-mean-token-mean` for the mean over responses of the sum, or the mean, over their tokens.
        constant_length: With `seq-mean-token-sum`, divide the sums by this number of tokens.
    """

    is_importance_weighted = True

    def __init__(
        self,
        min_weight: float = 0.0,
        max_weight: float = 1.2,
        level: RatioLevel = "token",
        aggregation: Aggregation = "token-mean",
        constant_length: int | None = None,
    ) -> None:
        super().__init__(aggregation, constant_length)
        check_option("level", level, RatioLevel)
        if not 0 <= min_weight <= 1 <= max_weight:
            raise InputError(
                f"`min_weight`={min_weight} and `max_weight`={max_weight} are no range around the weight 1; use 0 "
                "to 1 for the lower and 1 or more for the upper."
            )
        self.min_weight = min_weight
        self.max_weight = max_weight
        self.level: RatioLevel = level

    def token_losses(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Stats]:
        """See `TokenObjective`."""
        return functional.importance_weighted_objective(
            log_probs, old_log_probs, advantages, mask, self.min_weight, self.max_weight, self.level
        )


class SequenceClipObjective(Objective):
    """One ratio for the whole response, clipped once (the article; length-normalised as in GSPO).

    Args:
        clip_low: The ratio is clipped below at `1 − clip_low`.
        clip_high: The ratio is clipped above at `1 + clip_high`.
        normalize: `length` takes the geometric mean of the token ratios, `none` their product.
        against: The ratio's denominator: the policy that sampled (`behaviour`) or the `reference` policy.
    """

    denominator_unit = "sequences"
    takes_token_advantages = False

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalize: RatioNormalization = "length",
        against: RatioDenominator = "behaviour",
    ) -> None:
        _check_clip(clip_low, clip_high)
        check_option("normalize", normalize, RatioNormalization)
        check_option("against", against, RatioDenominator)
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
        return _share(losses, denominator), stats


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise InputError(
            f"`clip_low`={clip_low} and `clip_high`={clip_high} are no range around the ratio 1; use 0 to 1 for "
            "the lower and 0 or more for the upper."
        )


def _share(losses: Tensor, denominator: Tensor) -> Tensor:
    """The losses' sum over the mini-batch's count, which is float64, in the losses' own type."""
    return losses.sum() / denominator.to(losses.dtype)


class ValueLoss(ABC):
    """What a critic minimises, and what its output means."""

    critics: ClassVar[frozenset[str]] = frozenset({"prompt", "token"})  # what a critic may read to use it

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """`V` in the unit of the reward, of the critic's outputs; same shape."""

    @abstractmethod
    def __call__(self, outputs: Tensor, old_values: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        """The loss of these values, as their share of the mini-batch's.

        Args:
            outputs: `[M]`, the critic's, with gradient: one per prompt, or one per response token.
            old_values: `[M]`, `V` before this iteration's updates.
            targets: `[M]`, what `V` should be, in [0, 1].
            denominator: Sequences, or tokens, of the mini-batch over all micro-batches and ranks.
        """


class BinaryCrossEntropy(ValueLoss):
    """SPPO: the output is a logit, `V = sigmoid(v)` (arXiv 2604.08865); on tokens, the paper's ablation of PPO."""

    def predict(self, outputs: Tensor) -> Tensor:
        """`sigmoid(v)`."""
        return outputs.sigmoid()

    def __call__(self, outputs: Tensor, old_values: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        """See `ValueLoss`; a target outside [0, 1] is a `ValueError`."""
        return functional.critic_loss(outputs, targets, denominator)


class ClippedSquaredError(ValueLoss):
    """Token-level PPO: the output is `V` itself, and half its squared error is clipped around the old value.

    Args:
        clip: How far a value may move in one iteration before its gradient ends.
    """

    critics = frozenset({"token"})

    def __init__(self, clip: float = 0.5) -> None:
        if not clip > 0:
            raise InputError(
                f"`ClippedSquaredError.clip`={clip} leaves no room to learn; use 0.5, or .inf for no clip."
            )
        self.clip = clip

    def predict(self, outputs: Tensor) -> Tensor:
        """The outputs."""
        return outputs

    def __call__(self, outputs: Tensor, old_values: Tensor, targets: Tensor, denominator: Tensor) -> Tensor:
        """See `ValueLoss`."""
        ones = outputs.new_ones(outputs.shape)
        return _share(functional.clipped_value_loss(outputs, old_values, targets, ones, self.clip), denominator)
