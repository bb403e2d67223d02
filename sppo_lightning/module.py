"""Sequence-Level PPO (arXiv 2604.08865) as a LightningModule."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sppo_lightning import functional
from sppo_lightning.advantages import Advantage, SequenceAdvantage
from sppo_lightning.base import PolicyModule
from sppo_lightning.batch import Experience, MicroBatch, Prompt, PromptBatch
from sppo_lightning.batching import check_mini_batch_size, micro_batches, mini_batches
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import critic_metrics
from sppo_lightning.functional import KLEstimator
from sppo_lightning.meter import Meter
from sppo_lightning.models import CausalLMPolicy, PromptCritic
from sppo_lightning.objectives import Objective, TokenClipObjective
from sppo_lightning.optim import GroupOptimizer, Schedule, build_optimizer


class SPPOModule(PolicyModule):
    """Owns the policy, the critic and, where something uses it, the reference; trains them on scored rollouts.

    Args:
        policy: The model that is trained.
        critic: Predicts from the prompt alone the chance that the policy succeeds.
        advantage: Turns rewards and values into advantages; SPPO's `A = R − V` by default.
        objective: The policy loss; PPO's token-level clip by default.
        policy_optimizer: Learning rate, weight decay and gradient clip of the policy.
        critic_optimizer: Learning rate, weight decay and gradient clip of the critic.
        lr_schedule: How learning rates go on after the warm-up, in updates.
        warmup_updates: Updates over which the learning rates rise from zero.
        mini_batch_size: Sequences of one update over all ranks; the whole iteration when left out.
        micro_batch_tokens: Token budget of one forward and backward on one rank, padding included.
        kl_coef: Weight of the KL penalty to the reference in the loss; 0 loads no reference.
        kl_estimator: Estimator of that KL divergence.
        recompute_old_log_probs: Take the ratio's denominator from the trainer's own forward; if false, from the
            sampler, which saves a forward where both agree (`sampler/logprob_gap` says how well).
    """

    needs_in_fit = frozenset({"rollouts", "scores"})

    def __init__(
        self,
        policy: CausalLMPolicy,
        critic: PromptCritic | None = None,
        advantage: Advantage | None = None,
        objective: Objective | None = None,
        policy_optimizer: GroupOptimizer = GroupOptimizer(),  # noqa: B008 (frozen)
        critic_optimizer: GroupOptimizer = GroupOptimizer(lr=5e-6),  # noqa: B008 (frozen)
        lr_schedule: Schedule = "constant",
        warmup_updates: int = 0,
        mini_batch_size: int | None = None,
        micro_batch_tokens: int = 16384,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        recompute_old_log_probs: bool = True,
    ) -> None:
        super().__init__(policy)
        self.critic = critic
        self.reference: CausalLMPolicy | None = None
        self.advantage = advantage or SequenceAdvantage()
        self.objective = objective or TokenClipObjective()
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.lr_schedule = lr_schedule
        self.warmup_updates = warmup_updates
        self.mini_batch_size = mini_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.recompute_old_log_probs = recompute_old_log_probs
        if self.advantage.needs_critic and critic is None:
            raise InputError(
                f"`advantage`={type(self.advantage).__name__} needs a critic; set `model.critic`, for instance to "
                "sppo_lightning.models.PromptCritic."
            )

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration of SPPO: every prompt's response is one action; a mini-batch is one update."""
        start, meter = time.perf_counter(), Meter()
        rollouts = batch.rollouts
        assert rollouts is not None
        # R in [0, 1], by the verifiers; a response without a verdict teaches nothing
        verdicts = ~(rollouts.rewards + rollouts.shaping).isnan()
        rewards = rollouts.rewards.nan_to_num()
        with torch.no_grad():
            # V(s_p) = sigmoid(v): the critic reads the prompt and never the response
            values = None if self.critic is None else self.value_logits(batch.prompts)[rollouts.prompt_index]
            # A = R − V, before this batch's updates, the same for every token, not whitened
            advantages = self.advantage(rollouts, rewards, values) + rollouts.shaping.nan_to_num()
        experience = Experience(rollouts, rewards, advantages, verdicts)
        updates = [experience.rows(rows) for rows in self.mini_batch_rows(len(experience))]
        denominators = self.ratio_denominators(updates)
        for update, old_log_probs in zip(updates, denominators, strict=True):
            # tokens and sequences of the whole mini-batch over all ranks: the loss does not depend on the cut
            counts = self.global_counts(update)
            for micro in self.micro_batches(update):
                log_probs, entropy = self.policy(micro.rollouts)
                old = log_probs.detach() if old_log_probs is None else old_log_probs[micro.index]
                # r_t = π(y_t|…) / π_old(y_t|…), clipped; the loss is −min(r_t A, clip(r_t) A)
                policy_loss, stats = self.objective(
                    log_probs, old, micro.advantages, micro.mask, counts[self.objective.denominator_unit]
                )
                # binary cross-entropy between v and R
                value_loss = self.value_loss(micro, counts["sequences"])
                kl_loss = self.kl_loss(micro, log_probs, counts["tokens"])
                self.accumulate(policy_loss + value_loss + self.kl_coef * kl_loss, micro.last)
                self.count(meter, micro, policy_loss, value_loss, kl_loss, stats, log_probs, entropy)
            for name, norm in self.step_optimizer(self.trained_modules()).items():
                meter.add(f"{name}/grad_norm", norm)
        self.log_iteration(meter, experience, values)
        self.end_iteration(time.perf_counter() - start)

    # ------------------------------------------------------------------ what the step is made of

    def mini_batch_rows(self, rows: int) -> list[range]:
        """The rows of this rank that belong to each update."""
        ranks = self.trainer.world_size
        size = check_mini_batch_size(rows * ranks, self.mini_batch_size, ranks)
        return mini_batches(rows, size // ranks)

    def micro_batches(self, update: Experience) -> Iterator[MicroBatch]:
        """The rows of each backward, by the token budget; as many on every rank, for collectives to meet."""
        groups = micro_batches(update.lengths, self.micro_batch_tokens)
        most = int(self.trainer.strategy.reduce(torch.tensor(len(groups), device=self.device), reduce_op="max"))
        for i in range(most):
            index = groups[i] if i < len(groups) else [0]  # a rank that is done goes on with a row that is masked
            rows = update.rows(index)
            verdicts = rows.verdicts if i < len(groups) else torch.zeros_like(rows.verdicts)
            share = 1.0 / (most * self.trainer.world_size)
            yield MicroBatch(rows.rollouts, rows.rewards, rows.advantages, verdicts, index, share, i == most - 1)

    def global_counts(self, update: Experience) -> dict[str, Tensor]:
        """Response tokens and sequences with a verdict of this mini-batch, over all ranks; at least 1 each."""
        counts = torch.stack([update.mask.sum(), update.verdicts.sum()]).double()
        tokens, sequences = self.trainer.strategy.reduce(counts, reduce_op="sum").clamp(min=1.0)
        return {"tokens": tokens, "sequences": sequences}

    def ratio_denominators(self, updates: list[Experience]) -> list[Tensor | None]:
        """Log-probabilities `[N, T]` in the ratio's denominator, per update, frozen before the first one.

        None stands for the current ones: what the first update compares with itself needs no extra forward.
        """
        if self.objective.needs_reference:
            assert self.reference is not None
            return [self.frozen_log_probs(self.reference, update) for update in updates]
        if not self.recompute_old_log_probs:
            return [update.rollouts.sampled_log_probs for update in updates]
        return [None, *(self.frozen_log_probs(self.policy, update) for update in updates[1:])]

    @torch.no_grad()
    def frozen_log_probs(self, policy: CausalLMPolicy, update: Experience) -> Tensor:
        """Log-probabilities `[N, T]` under `policy`, without gradient, micro-batch by micro-batch."""
        log_probs = torch.zeros_like(update.rollouts.sampled_log_probs)
        for micro in self.micro_batches(update):
            log_probs[micro.index] = policy(micro.rollouts)[0]
        return log_probs

    @torch.no_grad()
    def value_logits(self, prompts: list[Prompt]) -> Tensor:
        """The critic's logits `v`, `[N]`, without gradient, within the token budget."""
        assert self.critic is not None
        groups = micro_batches([len(ids) for ids in self.critic.encode(prompts)], self.micro_batch_tokens)
        values = torch.cat([self.critic([prompts[i] for i in group]) for group in groups])
        order = torch.tensor([i for group in groups for i in group], device=values.device)
        return values[order.argsort()]

    def value_loss(self, micro: MicroBatch, sequences: Tensor) -> Tensor:
        """The critic's loss on these prompts, as their share of the mini-batch's."""
        if self.critic is None:
            return micro.rewards.sum() * 0.0
        values = self.critic(micro.rollouts.prompts)
        return functional.critic_loss(values[micro.verdicts], micro.rewards[micro.verdicts], sequences)

    def kl_loss(self, micro: MicroBatch, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """Mean KL penalty per token to the reference, as the share of the mini-batch's; 0 without one."""
        if not self.kl_coef:
            return log_probs.new_zeros(())
        assert self.reference is not None
        with torch.no_grad():
            reference = self.reference(micro.rollouts)[0]
        penalty = functional.kl_penalty(log_probs, reference, self.kl_estimator)
        return functional.aggregate(penalty, micro.mask, "token-mean", tokens)

    # ------------------------------------------------------------------ metrics

    def count(self, meter, micro, policy_loss, value_loss, kl_loss, stats, log_probs, entropy) -> None:
        """Add one micro-batch's losses (shares of the mini-batch's) and statistics (means over tokens)."""
        meter.add_share("policy/loss", policy_loss, micro.share)
        if self.critic is not None:
            meter.add_share("critic/loss", value_loss, micro.share)
        if self.kl_coef:
            meter.add_share("policy/kl", kl_loss, micro.share)
        tokens = micro.mask.sum()
        for name, value in stats.items():
            meter.add(f"policy/{name}", value, tokens)
        mask = micro.mask.bool()
        meter.add("policy/entropy", entropy[mask].mean(), tokens)
        if micro.rollouts.policy_version == self.trainer.global_step:  # the weights are still the sampler's
            gap = (log_probs.detach() - micro.rollouts.sampled_log_probs).abs()[mask].mean()
            meter.add("sampler/logprob_gap", gap, tokens)

    def log_iteration(self, meter: Meter, experience: Experience, values: Tensor | None) -> None:
        """Log the iteration's metrics over all ranks."""
        self.log_dict(meter.means(self.trainer.strategy))
        learned = experience.verdicts
        columns = [experience.rewards, experience.advantages, learned.float()]
        columns += [] if values is None else [values.sigmoid()]
        table = torch.as_tensor(self.all_gather(torch.stack(columns, dim=1))).reshape(-1, len(columns))
        table = table[table[:, 2] > 0]
        rewards, advantages = table[:, 0], table[:, 1]  # none where no response has a verdict: means are NaN
        self.log("reward/mean", rewards.mean(), prog_bar=True)
        self.log("advantage/std", advantages.std(correction=0))
        self.log("advantage/positive_fraction", (advantages > 0).float().mean())
        if values is not None:
            self.log("critic/value_mean", table[:, 3].mean(), prog_bar=True)
            if len(table):
                self.log_dict(critic_metrics(table[:, 3], rewards))

    def prompt_values(self, prompts: list[Prompt]) -> Tensor | None:
        """The critic's chance of success for each prompt, `[N]`, without gradient."""
        return None if self.critic is None else self.value_logits(prompts).sigmoid()

    # ------------------------------------------------------------------ modules and their optimizer

    def setup(self, stage: str) -> None:
        """Check the callbacks, the trainer's settings and the batch sizes, before anything is loaded."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        samples = [c.sampling.samples_per_prompt for c in self.trainer.callbacks if hasattr(c, "sampling")]  # type: ignore[attr-defined]
        if stage == "fit" and samples and getattr(data, "batch_size", None):
            check_mini_batch_size(data.batch_size * samples[0], self.mini_batch_size, self.trainer.world_size)

    def configure_model(self) -> None:
        """Load policy and critic, and the reference as a copy of the policy if something uses it."""
        super().configure_model()
        if self.critic is not None:
            self.critic.build()
        if self.reference is None and (self.kl_coef or self.objective.needs_reference):
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def trained_modules(self) -> dict[str, tuple[nn.Module, GroupOptimizer]]:
        """What is trained, by metric name, with its optimizer settings."""
        modules: dict[str, tuple[nn.Module, GroupOptimizer]] = {"policy": (self.policy, self.policy_optimizer)}
        if self.critic is not None:
            modules["critic"] = (self.critic, self.critic_optimizer)
        return modules

    def configure_optimizers(self) -> Any:
        """One AdamW with a group per module, so `trainer.global_step` counts updates once."""
        optimizer, schedule = build_optimizer(
            self.trained_modules(), self.lr_schedule, self.warmup_updates, self.trainer.max_steps
        )
        return [optimizer], [schedule]

    @torch.no_grad()
    def refresh_reference(self, mix: float = 1.0) -> None:
        """`reference ← mix · policy + (1 − mix) · reference`, in place."""
        assert self.reference is not None
        for old, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
            old.lerp_(new, mix)
