"""Importance weights for responses of older weights; see the package for shapes."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from sppo_lightning.functional.masking import MAX_LOG_RATIO, check_option, keep
from sppo_lightning.functional.objectives import RatioLevel


def truncated_importance_weights(
    logp: Tensor, sampled_logp: Tensor, mask: Tensor, max_weight: float, level: RatioLevel = "token"
) -> Tensor:
    """Weights `min(π / μ, max_weight)` of what `μ` sampled, for an expectation under `π`; without gradient.

    Args:
        logp: `[N, T]`, of `π`.
        sampled_logp: `[N, T]`, of the policy `μ` that sampled; log-ratios are clamped to ±20.
        mask: `[N, T]`.
        max_weight: greatest weight; `math.inf` for none.
        level: "token" for a weight per token, "sequence" for the joint ratio of the response at each of its tokens.

    Returns:
        `[N, T]`, 0 off the mask.

    Source: Ionides 2008, truncated importance sampling; per token, as between π_old and the sampler, decoupled
    PPO, arXiv 2110.00641, and AReaL, arXiv 2505.24298, equation 5.
    """
    check_option("level", level, get_args(RatioLevel))
    log_ratio = keep(logp - sampled_logp, mask).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(logp)
    return keep(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=max_weight), mask)
