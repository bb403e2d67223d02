"""How the policy learns from successes that are not an iteration's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts, Success
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.found_losses import FoundLoss
from sppo_lightning.module import SPPOModule

# what a rank without a success goes along with: another has some, and forwards may be collectives
_FILLER = Success(Prompt("", "", "", 0), [0], [0], [0.0], 0.0)


def learn(
    successes: Sequence[Success],
    values: Tensor,
    shares: Tensor,
    loss: FoundLoss,
    coef: float,
    temperature: float,
    module: SPPOModule,
) -> dict[str, float]:
    """Backward of `coef · mean over tokens of −share · weight · log π(y_t | …)` over all ranks; a collective.

    The gradient stays until the next update, which it joins: that exchanges it between ranks, and clips or drops it
    together with its own.

    Args:
        successes: `M` responses on this rank; there may be none.
        values: `[M]`, V of their prompts. Where R is below it the advantage is 0, so no success is unlearned.
        shares: `[M]`, in [0, 1], what each weight is multiplied by.
        loss: Gives the weights.
        coef: Of the loss.
        temperature: Of `π`, whatever it was when a response was sampled.
        module: Whose policy learns.

    Returns:
        Of the responses of all ranks: `loss`, without `coef`, and, where there are any, `weight_mean`, shares
        included, and `truncated_fraction`.
    """
    rollouts = as_rollouts(successes or [_FILLER], temperature, module)
    reduce: Any = module.trainer.strategy.reduce
    given = rollouts.sampled_log_probs.new_tensor([[s.reward, s.log_excess] for s in successes or [_FILLER]])
    counts = given.new_tensor([sum(len(s.response_ids) for s in successes), len(successes)])
    tokens, count = reduce(counts, reduce_op="sum").tolist()
    if not count:
        return {"loss": 0.0}
    if not successes:
        values = shares = given.new_zeros(1)
    advantages, shares = (given[:, 0] - values.to(given)).clamp(min=0.0), shares.to(given)
    sums = given.new_zeros(3)
    groups = module.groups(rollouts.lengths if successes else [], module.policy.packs)
    for [rows], _, _ in module.in_step(groups):
        part, advantage = rollouts.rows(rows.index), advantages[rows.index]
        log_probs, _ = module.policy(part)
        mask = part.response_mask
        weights = loss(log_probs, part.sampled_log_probs, mask, advantage, given[rows.index, 1])
        truncated = loss.truncated(weights, advantage)
        weights = weights * shares[rows.index] * rows.counts
        own = -(weights[:, None] * log_probs * mask).sum() / tokens
        module.accumulate(coef * own, last=False)  # ranks exchange it with the update's own
        sums += torch.stack([own.detach(), weights.sum(), truncated.sum() * rows.counts])
    total, weight, cut = reduce(sums, reduce_op="sum").tolist()
    return {"loss": total, "weight_mean": weight / count, "truncated_fraction": cut / count}


def as_rollouts(successes: Sequence[Success], temperature: float, module: SPPOModule) -> Rollouts:
    """One finished response per prompt."""
    batch = PromptBatch(
        [success.prompt for success in successes],
        [list(success.prompt_ids) for success in successes],
        [0 for _ in successes],
    )
    return pack_rollouts(
        batch,
        list(range(len(successes))),
        [list(success.response_ids) for success in successes],
        [list(success.log_probs) for success in successes],
        ["stop" for _ in successes],
        policy=module.policy,
        temperature=temperature,
        versions=[module.global_step for _ in successes],
    )
