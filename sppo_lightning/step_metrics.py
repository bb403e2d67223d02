"""What `training_step` reports of an iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sppo_lightning.batch import Rollouts
from sppo_lightning.calibration import critic_metrics
from sppo_lightning.experience import Experience, MicroBatch
from sppo_lightning.meter import Meter
from sppo_lightning.ranks import gather_rows
from sppo_lightning.skipping import Attempt


def count_micro_batch(
    module: Any,
    attempt: Attempt,
    micro: MicroBatch,
    losses: Mapping[str, Tensor | None],
    stats: Mapping[str, Tensor],
    log_probs: Tensor,
    entropy: Tensor,
) -> None:
    """Add one micro-batch to the update's metrics, and to what must be finite.

    Statistics of the policy are means over the tokens of its forward, so over rows with an advantage.

    Args:
        module: Whose weights, of `global_step`, these are.
        attempt: What is added to.
        micro: The rows.
        losses: Shares of the mini-batch's losses by metric name; None for one that there is not.
        stats: The objective's means over tokens.
        log_probs: `[N, T]`, nats.
        entropy: `[N, T]`, nats.
    """
    prompts = {"critic/loss": micro.critic.rollouts.prompts}
    if micro.replayed is not None:
        prompts["critic/replay_loss"] = micro.replayed.prompts
    for name, loss in losses.items():
        if loss is not None:
            attempt.add_share(name, loss, micro.share)
            attempt.check(name, loss, prompts.get(name, micro.policy.rollouts.prompts))
    attempt.check_log_probs(micro.index, log_probs, micro.policy.mask)
    if micro.replayed is not None:
        counted = micro.replayed.weights > 0
        attempt.add("critic/replay_age", micro.replayed.ages[counted].mean(), counted.sum())
    mask, tokens = micro.policy.mask.bool(), micro.policy.mask.sum()
    for name, value in stats.items():
        attempt.add(f"policy/{name}", value, tokens)
    attempt.add("policy/entropy", entropy[mask].mean(), tokens)
    rollouts = micro.policy.rollouts
    count_padding(attempt, rollouts, module.policy.packs)
    fresh = mask & (rollouts.policy_versions == module.global_step)[:, None]  # of the weights that sampled them
    attempt.add("sampler/logprob_gap", sampler_gaps(log_probs, rollouts, fresh).mean(), fresh.sum())


def count_padding(attempt: Attempt, rollouts: Rollouts, packed: bool) -> None:
    """Add the padding of a forward over these rows, as a share of the tokens that are computed."""
    lengths = rollouts.prompt_mask.sum(1) + rollouts.response_mask.sum(1)
    computed = lengths.sum() if packed else F.pad(lengths, (0, 1)).max() * len(rollouts)
    attempt.add("update/padding_fraction", 1.0 - lengths.sum() / computed, computed)


def sampler_gaps(log_probs: Tensor, rollouts: Rollouts, chosen: Tensor) -> Tensor:
    """How far the trainer's log-probabilities `[N, T]` are from the sampler's at the `chosen` `[N, T]`, nats."""
    return (log_probs.detach() - rollouts.sampled_log_probs).abs()[chosen]


def report(module: Any, meter: Meter, experience: Experience, remembered: Mapping[str, float]) -> None:
    """Log an iteration over all ranks, and let the critic's warm-up see how good the critic was.

    An iteration in which no update was made has no figures.

    Args:
        module: That learned.
        meter: Of the updates that were made.
        experience: What they learned from.
        remembered: Figures of what outlives the iteration.
    """
    module.last_figures = {}
    if not meter.totals:
        return
    metrics = iteration_metrics(module, experience)
    figures = meter.means(module.trainer.strategy) | metrics | dict(remembered)
    if module.critic_warmup is not None:
        module.critic_warmup.observe(module.trainer.global_step, metrics)
        figures["critic/warming_up"] = float(module.critic_warmup.running)
    for name, value in figures.items():
        module.log(name, value, prog_bar=name in ("reward/mean", "critic/value_mean"))
    module.last_figures = figures


def iteration_metrics(module: Any, experience: Experience) -> dict[str, Tensor]:
    """Reward, advantages and the critic's foresight over all ranks; NaN for means over no response."""
    values = experience.values
    columns = [experience.rewards, experience.verdicts.float()]
    columns += [] if values is None else [values if values.ndim == 1 else values[:, 0]]  # V(s_p)
    table = gather_rows(torch.stack(columns, dim=1))
    table = table[table[:, 1] > 0]
    rewards = table[:, 0]
    metrics = {"reward/mean": rewards.mean(), **_advantage_metrics(module, experience)}
    if values is not None:
        metrics["critic/value_mean"] = table[:, 2].mean()
        if len(table):
            metrics |= critic_metrics(table[:, 2].clamp(0.0, 1.0), rewards)
    return metrics


def _advantage_metrics(module: Any, experience: Experience) -> dict[str, Tensor]:
    """Spread and sign of the advantages, over responses, or over tokens where each has its own."""
    advantages = experience.advantages.double()
    kept = experience.verdicts if advantages.ndim == 1 else experience.mask.bool()
    chosen = advantages[kept]
    informative = torch.tensor(float(len(experience.informative)), device=advantages.device)
    parts = [torch.ones_like(chosen), chosen, chosen.square(), (chosen > 0).double()]
    sums = torch.stack([*(part.sum() for part in parts), informative, experience.verdicts.sum().double()])
    count, first, second, positive, moving, rows = module.trainer.strategy.reduce(sums, reduce_op="sum")
    variance = (second / count - (first / count).square()).clamp(min=0.0)
    return {
        "advantage/mean": (first / count).float(),
        "advantage/std": variance.sqrt().float(),
        "advantage/positive_fraction": (positive / count).float(),
        "advantage/nonzero_fraction": (moving / rows).float(),
    }
