"""What a response is worth beyond what was expected; see the package for shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sppo_lightning.functional.masking import EPS, divide, keep


def sequence_advantage(rewards: Tensor, value_logits: Tensor) -> Tensor:
    """SPPO's advantage `[N]` (arXiv 2604.08865), the same for each of its tokens: `A = R − sigmoid(v)`.

    Args:
        rewards: `R` in [0, 1].
        value_logits: `[N]`, the critic's `v` at the last prompt token, from before this batch's updates.
    """
    return rewards - torch.sigmoid(value_logits)


def gae(
    token_rewards: Tensor,
    token_values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """Generalized advantages `A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} − V_t`, and returns `G = A + V`.

    Both are `[N, T]`, zero where the mask is; a masked position is stepped over. Computed as the equal
    `G_t = r_t + γ ((1 − λ) V_{t+1} + λ G_{t+1})`, which no rounding takes out of [0, 1] where the values and a
    single reward at the end are in it.

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
    kept, rewards, values = mask.bool(), keep(token_rewards, mask), keep(token_values, mask)
    next_return = next_value = values.new_zeros(len(values))
    columns: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        ahead = (1 - lam) * next_value + lam * next_return
        next_return = torch.where(kept[:, t], rewards[:, t] + gamma * ahead, next_return)
        next_value = torch.where(kept[:, t], values[:, t], next_value)
        columns.append(next_return)
    returns = keep(torch.stack(columns[::-1], dim=1), mask) if columns else torch.zeros_like(values)
    advantages = returns - values
    return whiten_tokens(advantages, mask) if whiten else advantages, returns


def whiten_tokens(values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`values` `[N, T]` with mean 0 and unbiased variance 1 over all response tokens; fewer than two become 0.

    Args:
        values: `[N, T]`.
        mask: `[N, T]`.
        sum_over_ranks: adds a tensor up over ranks, where each holds a part of the tokens.
    """
    total = sum_over_ranks or (lambda tensor: tensor)
    kept = keep(values, mask)
    count, first = total(torch.stack([mask.bool().sum().to(kept.dtype), kept.sum()]))
    centred = keep(kept - divide(first, count, EPS), mask)
    variance = divide(total(centred.square().sum()), count, EPS) * count / (count - 1).clamp(min=1)
    return torch.where(count > 1, centred * torch.rsqrt(variance + EPS), 0.0)


def last_token_rewards(rewards: Tensor, mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """`[N, T]`: `R` at each response's last token, minus `penalties` `[N, T]` (such as β·KL) at every token."""
    tokens_from_here = mask.bool().flip(1).cumsum(dim=1).flip(1)
    placed = torch.where(mask.bool() & (tokens_from_here == 1), rewards[:, None], 0.0)
    return placed if penalties is None else placed - keep(penalties, mask)


def blend_advantages(sequence_advantages: Tensor, token_advantages: Tensor, mask: Tensor, weight: float) -> Tensor:
    """`[N, T]`: `w · A_seq + (1 − w) · A_token`, zero where the mask is.

    Args:
        sequence_advantages: `[N]`.
        token_advantages: `[N, T]`.
        mask: `[N, T]`.
        weight: `w`, from 0 to 1.
    """
    return keep(weight * sequence_advantages[:, None] + (1 - weight) * token_advantages, mask)


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


def pooled_advantage(
    rewards: Tensor, values: Tensor, groups: Tensor, judged: Tensor, prior_strength: float
) -> Tensor:
    """`A_i = R_i − (k·V + Σ_{j≠i} R_j) / (k + n − 1)` `[N]`: V pooled with the prompt's other responses.

    Exactly `R − V` for a prompt with one judged response: computed as `R_i − V − Σ_{j≠i} (R_j − V) / (k + n − 1)`.

    Args:
        rewards: `R`.
        values: `[N]`, V, the same for all responses to a prompt.
        groups: int64, 0 or more; equal numbers mark the responses to one prompt, in any order.
        judged: `[N]`, bool; False for a response without a verdict, which counts for none of the others.
        prior_strength: `k`, the responses that V counts as.
    """
    surprises = rewards - values
    kept, none = keep(surprises, judged), surprises.new_zeros(int(groups.max()) + 1 if len(groups) else 0)
    counts = judged.to(surprises.dtype)
    total, size = (none.index_add(0, groups, each)[groups] for each in (kept, counts))
    return surprises - (total - kept) / (prior_strength + size - counts)


def greedy_baseline_advantage(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """ReMax's advantage `[N]` (arXiv 2310.10505): the reward minus that of the prompt's greedy response."""
    return rewards - greedy_rewards
