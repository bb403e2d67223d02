"""The critic's losses, the KL penalty, and how token losses become one number; see the package for shapes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sppo_lightning.functional.masking import EPS, MAX_LOG_RATIO, check_option, divide, keep

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KLEstimator = Literal["k1", "k2", "k3"]

MAX_K3 = 10.0


def critic_loss(value_logits: Tensor, rewards: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Mean over sequences of the binary cross-entropy `−R log σ(v) − (1 − R) log(1 − σ(v))`; 0 for none.

    Args:
        value_logits: `[N]`, the critic's `v`.
        rewards: targets `R`.
        denominator: as for `aggregate`, in sequences.

    Raises:
        ValueError: a target is outside [0, 1].

    Source: SPPO, arXiv 2604.08865 (critic objective).
    """
    bad = ~((rewards >= 0) & (rewards <= 1))  # in this form NaN is bad too
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"`rewards`[{row}]={rewards[row].item():g} is outside [0, 1]; rescale the rewards.")
    targets = rewards.to(value_logits.dtype)
    total = F.binary_cross_entropy_with_logits(value_logits, targets, reduction="sum")
    return divide(total, len(rewards) if denominator is None else denominator)


def clipped_value_loss(
    token_values: Tensor, old_token_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.5
) -> Tensor:
    """Losses `[N, T]` `½ max((V − G)², (clip(V, V_old ± clip) − G)²)` of a token-level critic, zero off the mask.

    Args:
        token_values: `[N, T]`, `V` of the critic.
        old_token_values: `[N, T]`, `V_old`, from before this batch's updates.
        returns: `[N, T]`, targets `G`.
        mask: `[N, T]`.
        clip: how far a value may move from the old one before its gradient ends; `math.inf` for no bound.

    Source: PPO's reference implementation (baselines `ppo2`); arXiv 1707.06347 has the unclipped loss.
    """
    # Masked before they are squared: where a value is NaN, so is the square's gradient, even times 0.
    values, old, targets = keep(token_values, mask), keep(old_token_values, mask), keep(returns, mask)
    clipped = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - targets).square(), (clipped - targets).square()) / 2


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimates `[N, T]` of KL(policy ‖ reference), nats; masked positions are left to `aggregate`.

    Args:
        logp: `[N, T]`, of the policy.
        ref_logp: `[N, T]`, of the reference; `Δ = logp − ref_logp`, clamped to ±20.
        estimator: "k1" is `Δ`, "k2" `Δ²/2`, "k3" `exp(−Δ) + Δ − 1`, clamped to ±10.

    Source: J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    check_option("estimator", estimator, get_args(KLEstimator))
    delta = (logp - ref_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k3":
        return (torch.expm1(-delta) + delta).clamp(-MAX_K3, MAX_K3)
    return delta if estimator == "k1" else delta.square() / 2


def aggregate(
    token_losses: Tensor, mask: Tensor, mode: Aggregation, denominator: float | Tensor | None = None
) -> Tensor:
    """One loss out of those of the tokens; 0 where the mask is all zero.

    Args:
        token_losses: `[N, T]`.
        mask: `[N, T]`; a row without tokens counts as no sequence.
        mode: "token-mean" for the mean over all tokens; "seq-mean-token-sum" and "seq-mean-token-mean" for
            the mean over sequences of the sum, or the mean, over their tokens.
        denominator: tokens ("token-mean") or sequences of the whole mini-batch over all ranks, so that the
            losses of micro-batches add up to its loss; those of this mask if None.

    Source: "token-mean": DAPO, arXiv 2503.14476; "seq-mean-token-mean": GRPO, arXiv 2402.03300.
    """
    check_option("mode", mode, get_args(Aggregation))
    kept, lengths = keep(token_losses, mask), mask.bool().sum(dim=1)
    if mode == "token-mean":
        return divide(kept.sum(), lengths.sum() if denominator is None else denominator, EPS)
    sums = kept.sum(dim=1)
    if mode == "seq-mean-token-mean":
        sums = sums / lengths.clamp(min=1)
    return divide(sums.sum(), (lengths > 0).sum() if denominator is None else denominator)
