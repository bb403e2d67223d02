"""The mathematics: pure functions of tensors, none of which changes its inputs.

`N` sequences of `T` response tokens, right-padded; `mask` `[N, T]` is 1.0 on response tokens, the
end-of-sequence token included. What stands at other positions, NaN included, reaches no loss and no gradient.
`rewards`, `groups` and `advantages` are `[N]`, log-probabilities `[N, T]` in nats. float32 in, float32 out;
float64 in, float64 out. An unknown option is a `ValueError` that names those there are.

The `stats` of the objectives are detached scalars, each a mean over response tokens: weighted by the tokens
of each micro-batch, they average to those of the mini-batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KLEstimator = Literal["k1", "k2", "k3"]
RatioNormalization = Literal["length", "none"]

MAX_LOG_RATIO = 20.0  # further off a ratio says nothing more, and exp() overflows float32 near 88
MAX_K3 = 10.0
EPS = 1e-8  # keeps means over no tokens at 0


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"`{name}`={value!r} is unknown; use one of {', '.join(map(repr, options))}.")


def _keep(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, and zeros where the mask is zero; a product would let NaN through."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def _divide(total: Tensor, denominator: float | Tensor, eps: float = 0.0) -> Tensor:
    """`total / (denominator + eps)`, or the total (then an empty sum) where there is nothing to divide by."""
    below = torch.as_tensor(denominator, dtype=total.dtype, device=total.device) + eps
    return total / torch.where(below == 0, 1.0, below)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return _divide(_keep(values, mask).sum(), mask.bool().sum(), EPS)


def sequence_advantage(rewards: Tensor, value_logits: Tensor) -> Tensor:
    """SPPO's advantage `[N]` (arXiv 2604.08865), the same for each of its tokens: `A = R − sigmoid(v)`.

    Args:
        rewards: `R` in [0, 1].
        value_logits: `[N]`, the critic's `v` at the last prompt token, from before this batch's updates.
    """
    return rewards - torch.sigmoid(value_logits)


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
    return _divide(total, len(rewards) if denominator is None else denominator)


def gae(
    token_rewards: Tensor,
    token_values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalized advantages `A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} − V_t`, and returns `A + V`.

    Both are `[N, T]`, zero where the mask is; a masked position is stepped over.

    Args:
        token_rewards: `[N, T]`.
        token_values: `[N, T]`, in the unit of the rewards.
        mask: `[N, T]`.
        gamma: discount γ.
        lam: trace decay λ.
        whiten: give the advantages, not the returns, mean 0 and unbiased variance 1 over all response tokens;
            fewer than two tokens become 0.

    Source: GAE, arXiv 1506.02438, equation 16.
    """
    kept, rewards, values = mask.bool(), _keep(token_rewards, mask), _keep(token_values, mask)
    advantage = next_value = values.new_zeros(len(values))
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(kept[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(kept[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values)
    returns = _keep(advantages + values, mask)
    if whiten:
        count = kept.sum()
        centred = advantages - _token_mean(advantages, mask)
        variance = _token_mean(centred.square(), mask) * count / (count - 1).clamp(min=1)
        advantages = torch.where(count > 1, centred * torch.rsqrt(variance + EPS), 0.0)
    return _keep(advantages, mask), returns


def _centre_in_groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards minus their group's mean `[N]`, each row's group `[N]` and the sizes of the groups `[G]`."""
    ids, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        raise ValueError(
            f"`groups` has one sample in group {ids[sizes < 2][0].item()}, which leaves no baseline; "
            "sample at least 2 responses per prompt."
        )
    # Counted from the group's least reward, so that equal rewards give exactly 0, not a rounding error that
    # the division by a standard deviation near 0 would blow up.
    least = rewards.new_zeros(len(ids)).scatter_reduce(0, group, rewards, "amin", include_self=False)
    above = rewards - least[group]
    means = above.new_zeros(len(ids)).index_add(0, group, above) / sizes
    return above - means[group], group, sizes


def group_advantage(rewards: Tensor, groups: Tensor, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage `[N]`, `(R − mean) / (std + eps)` in its group; exactly 0 where all rewards are equal.

    Args:
        rewards: `R`.
        groups: int64; equal numbers mark the responses to one prompt, in any order.
        scale_by_std: divide by the group's unbiased standard deviation.
        eps: added to the standard deviation.

    Raises:
        ValueError: a group has one member.

    Source: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    centred, group, sizes = _centre_in_groups(rewards, groups)
    if not scale_by_std:
        return centred
    squares = centred.new_zeros(len(sizes)).index_add(0, group, centred.square())
    return centred / ((squares / (sizes - 1)).sqrt()[group] + eps)


def leave_one_out_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """RLOO's advantage `[N]` (arXiv 2402.14740): the reward minus the mean reward of its group's others.

    `groups` are as for `group_advantage`; a group of one is the same error.
    """
    centred, group, sizes = _centre_in_groups(rewards, groups)
    others = (sizes - 1).to(centred.dtype)[group]
    return centred * (others + 1) / others


def greedy_baseline_advantage(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """ReMax's advantage `[N]` (arXiv 2310.10505): the reward minus that of the prompt's greedy response."""
    return rewards - greedy_rewards


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
    advantages = _keep(token_advantages.expand_as(logp), mask)
    log_ratio = _keep(logp - old_logp, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    bounded = (advantages < 0) & (losses > -advantages * dual_clip)
    stats = {
        "clip_fraction": _token_mean((clipped > unclipped).to(logp.dtype), mask),
        "dual_clip_fraction": _token_mean(bounded.to(logp.dtype), mask),
        "approx_kl": _token_mean(-log_ratio.detach(), mask),
    }
    return torch.where(bounded, -advantages * dual_clip, losses), stats


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
    _check_option("normalize", normalize, get_args(RatioNormalization))
    token_log_ratio, lengths = _keep(logp - old_logp, mask), mask.bool().sum(dim=1)
    log_ratio = token_log_ratio.sum(dim=1)
    if normalize == "length":
        log_ratio = log_ratio / lengths.clamp(min=1)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = _keep(advantages, lengths)
    unclipped, clipped = -weights * ratio, -weights * ratio.clamp(1 - clip_low, 1 + clip_high)
    is_clipped = (clipped > unclipped).to(logp.dtype)
    stats = {
        "clip_fraction": _token_mean(is_clipped[:, None].expand_as(logp), mask),
        "approx_kl": _token_mean(-token_log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask),
    }
    return torch.maximum(unclipped, clipped), stats


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimates `[N, T]` of KL(policy ‖ reference), nats; masked positions are left to `aggregate`.

    Args:
        logp: `[N, T]`, of the policy.
        ref_logp: `[N, T]`, of the reference; `Δ = logp − ref_logp`, clamped to ±20.
        estimator: "k1" is `Δ`, "k2" `Δ²/2`, "k3" `exp(−Δ) + Δ − 1`, clamped to ±10.

    Source: J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
    """
    _check_option("estimator", estimator, get_args(KLEstimator))
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
    _check_option("mode", mode, get_args(Aggregation))
    kept, lengths = _keep(token_losses, mask), mask.bool().sum(dim=1)
    if mode == "token-mean":
        return _divide(kept.sum(), lengths.sum() if denominator is None else denominator, EPS)
    sums = kept.sum(dim=1)
    if mode == "seq-mean-token-mean":
        sums = sums / lengths.clamp(min=1)
    return _divide(sums.sum(), (lengths > 0).sum() if denominator is None else denominator)
