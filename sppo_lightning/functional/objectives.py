"""Policy objectives; see the package for shapes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sppo_lightning.functional.masking import MAX_LOG_RATIO, check_option, keep, token_mean

RatioNormalization = Literal["length", "none"]
RatioLevel = Literal["token", "sequence"]


def token_clip_objective(
    logp: Tensor,
    old_logp: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[N, T]` `−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)`, at most `−c A` if A < 0.

    `stats`: `clip_fraction`, `dual_clip_fraction`, `approx_kl` (mean of `old_logp − logp`).

    Args:
        logp: `[N, T]`, of the policy.
        old_logp: `[N, T]`, of the policy that sampled; `log r = logp − old_logp`, clamped to ±20.
        token_advantages: `[N, T]`, or `[N, 1]` for one advantage per sequence.
        mask: `[N, T]`.
        clip_low: how far below 1 the ratio still counts.
        clip_high: how far above 1 the ratio still counts.
        dual_clip: `c` above 1, the bound on what one token with A < 0 may cost; `math.inf` for none.

    Raises:
        ValueError: `dual_clip` is not above 1.

    Source: PPO, arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729; two-sided range, arXiv 2503.14476.
    """
    if not dual_clip > 1:
        raise ValueError(f"`dual_clip`={dual_clip} is not above 1; use 3.0, or math.inf for no bound.")
    advantages = keep(token_advantages.expand_as(logp), mask)
    log_ratio = keep(logp - old_logp, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    bounded = (advantages < 0) & (losses > -advantages * dual_clip)
    stats = {
        "clip_fraction": token_mean((clipped > unclipped).to(logp.dtype), mask),
        "dual_clip_fraction": token_mean(bounded.to(logp.dtype), mask),
        "approx_kl": token_mean(-log_ratio.detach(), mask),
    }
    return torch.where(bounded, -advantages * dual_clip, losses), stats


def importance_weighted_objective(
    logp: Tensor,
    old_logp: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    min_weight: float = 0.0,
    max_weight: float = 1.2,
    level: RatioLevel = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[N, T]` `−sg(clip(r, min_weight, max_weight)) A log π`: every token keeps a gradient.

    The importance weight is a constant (`sg`: no gradient), so truncating it bounds the variance and, unlike
    PPO's clip, silences no token. `stats`: `clip_fraction` (share of tokens with a truncated weight),
    `weight_mean`, `approx_kl`.

    Args:
        logp: `[N, T]`, of the policy.
        old_logp: `[N, T]`, of the policy that sampled; `log r` is clamped to ±20.
        token_advantages: `[N, T]`, or `[N, 1]` for one advantage per sequence.
        mask: `[N, T]`.
        min_weight: least weight; 0 truncates from above alone.
        max_weight: greatest weight; `math.inf` for none.
        level: "token" for a ratio per token, "sequence" for the joint ratio of the response at each of its tokens.

    Source: "token": CISPO, arXiv 2506.13585, equation 4; truncated importance sampling, Ionides 2008.
    """
    check_option("level", level, get_args(RatioLevel))
    advantages = keep(token_advantages.expand_as(logp), mask)
    token_log_ratio = keep(logp - old_logp, mask).detach()
    log_ratio = token_log_ratio if level == "token" else token_log_ratio.sum(dim=1, keepdim=True).expand_as(logp)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.clamp(min_weight, max_weight)
    stats = {
        "clip_fraction": token_mean((weight != ratio).to(logp.dtype), mask),
        "weight_mean": token_mean(weight, mask),
        "approx_kl": token_mean(-token_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask),
    }
    return -weight * advantages * keep(logp, mask), stats


def sequence_clip_objective(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalize: RatioNormalization = "length",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[N]` `−min(r A, clip(r, 1 − clip_low, 1 + clip_high) A)`, with one ratio per sequence.

    A sequence without tokens has loss 0. `stats`: `clip_fraction` (the share of tokens that stand in clipped
    sequences), `approx_kl` (mean of `old_logp − logp` over tokens).

    Args:
        logp: `[N, T]`, of the policy.
        old_logp: `[N, T]`, of the ratio's denominator: the policy that sampled, or the reference.
        advantages: `[N]`.
        mask: `[N, T]`.
        clip_low: how far below 1 the ratio still counts.
        clip_high: how far above 1 the ratio still counts.
        normalize: "none" for the joint ratio, `log r = Σ_t (logp − old_logp)`; "length" for its geometric
            mean over the sequence's tokens. `log r` is clamped to ±20.

    Source: "length": GSPO, arXiv 2507.18071; "none": PPO, arXiv 1707.06347, with the response as the action.
    """
    check_option("normalize", normalize, get_args(RatioNormalization))
    token_log_ratio, lengths = keep(logp - old_logp, mask), mask.bool().sum(dim=1)
    log_ratio = token_log_ratio.sum(dim=1)
    if normalize == "length":
        log_ratio = log_ratio / lengths.clamp(min=1)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = keep(advantages, lengths)
    unclipped, clipped = -weights * ratio, -weights * ratio.clamp(1 - clip_low, 1 + clip_high)
    is_clipped = (clipped > unclipped).to(logp.dtype)
    stats = {
        "clip_fraction": token_mean(is_clipped[:, None].expand_as(logp), mask),
        "approx_kl": token_mean(-token_log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask),
    }
    return torch.maximum(unclipped, clipped), stats
