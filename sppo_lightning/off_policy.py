"""What is done about responses that other weights than the present ones sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.errors import InputError, check_option
from sppo_lightning.experience import Experience
from sppo_lightning.functional import RatioLevel
from sppo_lightning.objectives import Stats


class TruncatedImportance:
    """Weighs advantages by `min(π_old / μ, max_weight)`: `μ` sampled, `π_old` is the policy before the updates.

    So what is minimised is what it would be for responses of `π_old`, but for the truncation, and the objective's
    ratio stays `π / π_old`. It is used where responses are sampled ahead (`RolloutGeneration.prefetch`).

    Source: decoupled PPO, arXiv 2110.00641; truncated importance sampling, Ionides 2008.

    Args:
        max_weight: Greatest weight.
        level: `token` for a weight per token, `sequence` for the joint ratio of the response; where left out, per
            token, or per response for an objective that takes one advantage per response.
    """

    def __init__(self, max_weight: float = 2.0, level: RatioLevel | None = None) -> None:
        if not max_weight >= 1:
            raise InputError(
                f"`TruncatedImportance.max_weight`={max_weight} would lower the weight of responses that "
                "the present policy likes as much; use 1 or more, such as 2.0."
            )
        if level is not None:
            check_option("TruncatedImportance.level", level, RatioLevel)
        self.max_weight = max_weight
        self.level = level

    def __call__(self, rows: Experience, old_log_probs: Tensor, per_token: bool) -> tuple[Tensor, Stats]:
        """Weighted advantages, and statistics of the weights.

        Args:
            rows: What is learned from, with `μ`'s log-probabilities in its rollouts.
            old_log_probs: `[N, T]`, nats, of `π_old`.
            per_token: Whether the objective takes an advantage per token.

        Returns:
            `[N, T]`, or `[N]` where it is not `per_token`; means over response tokens.
        """
        level: RatioLevel = self.level or ("token" if per_token else "sequence")
        sampled, mask = rows.rollouts.sampled_log_probs, rows.mask
        weights = functional.truncated_importance_weights(old_log_probs, sampled, mask, self.max_weight, level)
        stats = {
            "importance_weight_mean": functional.token_mean(weights, mask),
            "importance_truncated_fraction": functional.token_mean((weights >= self.max_weight).to(weights), mask),
        }
        if not per_token:
            return rows.advantages * weights.amax(dim=1), stats  # the same at each of a response's tokens
        advantages = rows.advantages if rows.advantages.ndim == 2 else rows.advantages[:, None]
        return advantages * weights, stats


def compares_with_sampler(module: Any) -> bool:
    """Whether the ratio's denominator is what the sampler said; by the settings, so the same on every rank."""
    callbacks = module.trainer.callbacks
    if any(getattr(callback, "sample_from", "policy") == "reference" for callback in callbacks):
        return True
    # a ratio that is itself the importance weight must be the whole one
    weighs_itself = module.objective.is_importance_weighted and samples_ahead(callbacks)
    return weighs_itself or not module.recompute_old_log_probs


def corrected(module: Any, rows: Experience, old_log_probs: Tensor) -> tuple[Tensor, Stats]:
    """The advantages, weighed by `module.importance` where older weights sampled, and statistics of the weights."""
    if compares_with_sampler(module) or not samples_ahead(module.trainer.callbacks):
        return rows.advantages, {}
    return module.importance(rows, old_log_probs, module.objective.takes_token_advantages)


def samples_ahead(callbacks: Iterable[Any]) -> bool:
    """Whether responses are of weights from before the last updates."""
    return any(getattr(callback, "prefetch", 0) for callback in callbacks)
