"""Sequence-Level PPO (arXiv 2604.08865) as a LightningModule, and the algorithms that differ in a component."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.actor_critic import ActorCritic
from sppo_lightning.advantages import Advantage, SequenceAdvantage
from sppo_lightning.balance import balanced
from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.batching import check_mini_batch_size, mini_batches, with_extra
from sppo_lightning.combination import KLPlace, check_combination, check_sampling
from sppo_lightning.experience import Experience, MicroBatch, Outcomes, Replayed, teaching
from sppo_lightning.functional import KLEstimator
from sppo_lightning.meter import Meter
from sppo_lightning.models import CausalLMPolicy, Critic
from sppo_lightning.objectives import BinaryCrossEntropy, Objective, TokenClipObjective, ValueLoss
from sppo_lightning.off_policy import TruncatedImportance, compares_with_sampler, corrected
from sppo_lightning.optim import GroupOptimizer, Schedule
from sppo_lightning.phases import phase
from sppo_lightning.replay import CriticReplay
from sppo_lightning.skipping import Attempt
from sppo_lightning.step_metrics import count_micro_batch, report
from sppo_lightning.warmup import CriticWarmup

_TINY = torch.finfo(torch.float64).tiny  # for 0 / 0, where nothing is replayed yet


class SPPOModule(ActorCritic):
    """Owns the policy, the critic and, where something uses it, the reference; trains them on scored rollouts.

    Args:
        policy: The model that is trained.
        critic: Predicts the chance that the policy succeeds; SPPO's reads the prompt alone.
        advantage: Turns rewards and values into advantages; SPPO's `A = R − V` by default.
        objective: The policy loss; PPO's token-level clip by default.
        critic_objective: The critic's loss; SPPO's binary cross-entropy by default.
        critic_warmup: Lets the critic learn before the policy moves.
        critic_replay: Shows the critic prompts and outcomes of earlier iterations again.
        importance: Corrects for the age of responses that were sampled ahead.
        policy_optimizer: Learning rate and its warm-up, weight decay and gradient clip of the policy.
        critic_optimizer: The same of the critic.
        lr_schedule: How learning rates go on after their warm-up, in updates.
        mini_batch_size: Sequences of one update over all ranks, and any that AdaptiveSamples adds to their prompts
            besides; the whole iteration when left out.
        micro_batch_tokens: Token budget of one forward and backward on one rank, padding included.
        kl_coef: Weight of the KL penalty to the reference; 0 loads no reference.
        kl_estimator: Estimator of that KL divergence.
        kl_in: Whether the penalty is a term of the `loss` or is subtracted from the `reward`, token by token; the
            critic's target is the verifiers' reward either way.
        recompute_old_log_probs: Take the ratio's denominator from the trainer's own forward; if false, from the
            sampler, which saves a forward where both agree (`sampler/logprob_gap` says how well). Responses of
            the reference are always compared with what their sampler said.
        max_skipped_updates: Updates in a row that may be skipped because a number is not finite; after so many the
            run stops, with a checkpoint. 1 stops at the first one, null never.
    """

    needs_in_fit = frozenset({"rollouts", "scores"})
    with_state = (*ActorCritic.with_state, "advantage")

    def __init__(
        self,
        policy: CausalLMPolicy,
        critic: Critic | None = None,
        advantage: Advantage | None = None,
        objective: Objective | None = None,
        critic_objective: ValueLoss | None = None,
        critic_warmup: CriticWarmup | None = None,
        critic_replay: CriticReplay | None = None,
        importance: TruncatedImportance | None = None,
        policy_optimizer: GroupOptimizer = GroupOptimizer(),  # noqa: B008 (frozen)
        critic_optimizer: GroupOptimizer = GroupOptimizer(lr=5e-6),  # noqa: B008 (frozen)
        lr_schedule: Schedule = "constant",
        mini_batch_size: int | None = None,
        micro_batch_tokens: int = 16384,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in: KLPlace = "loss",
        recompute_old_log_probs: bool = True,
        max_skipped_updates: int | None = 5,
    ) -> None:
        super().__init__(
            policy,
            critic,
            critic_objective or BinaryCrossEntropy(),
            critic_warmup,
            critic_replay,
            policy_optimizer,
            critic_optimizer,
            lr_schedule,
            micro_batch_tokens,
            max_skipped_updates,
        )
        self.advantage = advantage or SequenceAdvantage()
        self.objective = objective or TokenClipObjective()
        self.importance = importance or TruncatedImportance()
        self.mini_batch_size = mini_batch_size
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.kl_in = kl_in
        self.recompute_old_log_probs = recompute_old_log_probs
        check_combination(self)

    @phase("`update`")
    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Experience]:
        """One iteration of SPPO: every prompt's response is one action; a mini-batch is one update."""
        start, meter, learned = time.perf_counter(), Meter(), list[int]()
        rollouts = batch.rollouts
        assert rollouts is not None
        with torch.no_grad():
            # R in [0, 1], by the verifiers; V(s_p) = sigmoid(v): the critic reads the prompt, never the response
            outcomes = self.outcomes(batch, rollouts)
            # A = R − V, before this batch's updates, the same for every token, not whitened
            experience = self.experience(outcomes, self.advantage(outcomes))
        parts = self.mini_batch_rows(rollouts, batch.extra_responses)
        updates = [balanced(self, experience.rows(part)) for part in parts]
        for part, update, old_log_probs in zip(parts, updates, self.ratio_denominators(updates), strict=True):
            replayed, attempt = self.replayed(update), Attempt(old_log_probs=old_log_probs, **vars(update))
            # tokens and sequences of the whole mini-batch over all ranks: the loss does not depend on the cut
            counts = self.global_counts(update, replayed)
            for micro in self.micro_batches(update, replayed):
                log_probs, entropy = self.policy(micro.policy.rollouts)
                old = log_probs.detach() if old_log_probs is None else old_log_probs[micro.index]
                rows, denominator = micro.policy, counts[self.objective.denominator_unit]
                # A, or min(π_old / μ, c) A where μ, an older policy, sampled ahead
                advantages, weights = corrected(self, rows, old)
                # r_t = π(y_t|…) / π_old(y_t|…), clipped; the loss is −min(r_t A, clip(r_t) A)
                policy_loss, stats = self.objective(log_probs, old, advantages, rows.mask, denominator)
                # binary cross-entropy between v and R, of this mini-batch and, where asked for, of earlier ones
                value_loss = self.value_loss(micro.critic, counts)
                replay_loss = self.replay_loss(micro.replayed, counts)
                kl_loss = self.kl_loss(rows, log_probs, counts["tokens"])
                self.accumulate(total(policy_loss, self.kl_coef, kl_loss, value_loss, replay_loss), micro.last)
                losses = {"policy/loss": policy_loss, "critic/loss": value_loss, "policy/kl": kl_loss}
                losses["critic/replay_loss"] = replay_loss
                count_micro_batch(self, attempt, micro, losses, stats | weights, log_probs, entropy)
            if self.step_optimizer(self.moving_modules(), attempt):  # unless a number is not finite
                meter.join(attempt)
                learned.extend(part)
            elif self.skipped_updates.are_too_many:
                break
        # what was skipped teaches nothing that outlives the iteration either
        taught = teaching(outcomes, learned), teaching(experience, learned)
        report(self, meter, taught[1], self.remember(*taught))
        self.end_iteration(len(experience), time.perf_counter() - start)
        # which callbacks get as the `outputs` of `on_train_batch_end`
        return {"experience": experience, "taught": taught[1]}

    # ------------------------------------------------------------------ what advantages are made of

    def outcomes(self, batch: PromptBatch, rollouts: Rollouts) -> Outcomes:
        """Rewards, verdicts and the critic's view of the responses."""
        greedy, verdicts = None, ~(rollouts.rewards + rollouts.shaping).isnan()
        if self.advantage.needs_greedy:
            assert batch.greedy_rollouts is not None
            greedy = batch.greedy_rollouts.rewards[rollouts.prompt_index]
            verdicts = verdicts & ~greedy.isnan()
        value_logits, token_values = self.critic_values(batch)
        return Outcomes(
            rollouts,
            rewards=rollouts.rewards.nan_to_num(),
            verdicts=verdicts,
            value_logits=value_logits,
            token_values=token_values,
            penalties=self.reward_penalties(rollouts),
            greedy_rewards=greedy if greedy is None else greedy.nan_to_num(),
            sum_over_ranks=lambda tensor: self.trainer.strategy.reduce(tensor, reduce_op="sum"),
        )

    def experience(self, outcomes: Outcomes, advantages: Tensor) -> Experience:
        """What the updates learn from: shaping joins the advantages, and never the critic's targets."""
        rollouts, shaping = outcomes.rollouts, outcomes.rollouts.shaping.nan_to_num()
        advantages = advantages + (shaping[:, None] * outcomes.mask if advantages.ndim == 2 else shaping)
        values = outcomes.token_values
        if outcomes.value_logits is not None:
            values = self.critic_objective.predict(outcomes.value_logits)
        targets = self.advantage.value_targets(outcomes)
        return Experience(rollouts, outcomes.rewards, advantages, outcomes.verdicts, values, targets)

    def reward_penalties(self, rollouts: Rollouts) -> Tensor | None:
        """`β · KL` estimates `[N, T]` that are subtracted from the reward; None where the loss holds them."""
        if not self.kl_coef or self.kl_in == "loss":
            return None
        assert self.reference is not None
        reference = self.frozen_log_probs(self.reference, rollouts, range(len(rollouts)))
        penalty = functional.kl_penalty(rollouts.sampled_log_probs, reference, self.kl_estimator)
        return self.kl_coef * penalty * rollouts.response_mask

    # ------------------------------------------------------------------ how the iteration is cut

    def mini_batch_rows(self, rollouts: Rollouts, extra: int) -> list[list[int]]:
        """The rows of this rank that belong to each update; the last `extra` ones go with their prompts' first."""
        ranks, rows = self.trainer.world_size, len(rollouts) - extra
        size = check_mini_batch_size(rows * ranks, self.mini_batch_size, ranks)
        return with_extra(mini_batches(rows, size // ranks), rollouts.prompt_index.tolist())

    def rows_that_move_the_policy(self, update: Experience) -> list[int]:
        """The rows of the policy's forward: where the advantage is exactly 0 there is no gradient, but a KL's."""
        if "policy" not in self.moving_modules():
            return []
        return list(range(len(update))) if self.kl_coef and self.kl_in == "loss" else update.informative

    def micro_batches(self, update: Experience, replayed: Replayed | None) -> Iterator[MicroBatch]:
        """The rows of each backward, by the token budget; as many on every rank, for collectives to meet."""
        groups = self.groups_of(update.rollouts, self.rows_that_move_the_policy(update))
        critic_lengths = [] if self.critic is None else self.critic.lengths(update.rollouts)
        for_critic, for_replay = self.groups(critic_lengths), self.groups(self.replayed_lengths(replayed))
        for [policy, critic, again], share, last in self.in_step(groups, for_critic, for_replay):
            seen = None if replayed is None else replayed.rows(again.index, again.counts)
            rows, for_value = (update.rows(chosen.index, chosen.counts) for chosen in (policy, critic))
            yield MicroBatch(rows, for_value, seen, policy.index, share, last)

    def groups_of(self, rollouts: Rollouts, rows: Sequence[int]) -> list[list[int]]:
        """`rows` in groups within the token budget of one forward."""
        lengths = rollouts.lengths
        groups = self.groups([lengths[row] for row in rows], self.policy.packs)
        return [[rows[i] for i in group] for group in groups]

    def global_counts(self, update: Experience, replayed: Replayed | None) -> dict[str, Tensor]:
        """Response tokens and sequences with a verdict, and the weights of what is replayed, over all ranks."""
        weight = update.mask.new_zeros(()) if replayed is None else replayed.weights.sum()
        counts = torch.stack([update.mask.sum().double(), update.verdicts.sum().double(), weight.double()])
        tokens, sequences, weight = self.trainer.strategy.reduce(counts, reduce_op="sum")
        return {
            "tokens": tokens.clamp(min=1.0),
            "sequences": sequences.clamp(min=1.0),
            "replayed": weight.clamp(min=_TINY),
        }

    # ------------------------------------------------------------------ ratio, value loss and KL

    def ratio_denominators(self, updates: list[Experience]) -> list[Tensor | None]:
        """Log-probabilities `[N, T]` in the ratio's denominator, per update, frozen before the first one.

        None stands for the current ones: what the first update compares with itself needs no extra forward.
        """

        def frozen(policy: CausalLMPolicy, update: Experience) -> Tensor:
            return self.frozen_log_probs(policy, update.rollouts, self.rows_that_move_the_policy(update))

        if self.objective.needs_reference:
            assert self.reference is not None
            return [frozen(self.reference, update) for update in updates]
        if compares_with_sampler(self):
            return [update.rollouts.sampled_log_probs for update in updates]
        return [None, *(frozen(self.policy, update) for update in updates[1:])]

    @torch.no_grad()
    def frozen_log_probs(self, policy: CausalLMPolicy, rollouts: Rollouts, rows: Sequence[int]) -> Tensor:
        """Log-probabilities `[N, T]` of `rows` under `policy`, without gradient, within the token budget."""
        log_probs = torch.zeros_like(rollouts.sampled_log_probs)
        for [group], _, _ in self.in_step(self.groups_of(rollouts, rows)):
            log_probs[group.index] = policy(rollouts.rows(group.index))[0]
        return log_probs

    def kl_loss(self, rows: Experience, log_probs: Tensor, tokens: Tensor) -> Tensor | None:
        """Mean KL penalty per token to the reference, as the share of the mini-batch's; None without one."""
        if not self.kl_coef or self.kl_in == "reward":
            return None
        assert self.reference is not None
        with torch.no_grad():
            reference = self.reference(rows.rollouts)[0]
        penalty = functional.kl_penalty(log_probs, reference, self.kl_estimator)
        return functional.aggregate(penalty, rows.mask, "token-mean", tokens)

    # ------------------------------------------------------------------ the run around the step

    @property
    def needs_reference(self) -> bool:
        """Whether the loss, the reward, the objective or a callback uses the reference."""
        return bool(self.kl_coef) or self.objective.needs_reference or super().needs_reference

    def setup(self, stage: str) -> None:
        """Check the callbacks, the trainer's settings and the batch sizes, before anything is loaded."""
        super().setup(stage)
        if stage != "fit":
            return
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        check_sampling(self, callbacks)
        data: Any = getattr(self.trainer, "datamodule", None)
        samples = [callback.sampling.samples_per_prompt for callback in callbacks if hasattr(callback, "sampling")]
        if samples and getattr(data, "batch_size", None):
            check_mini_batch_size(data.batch_size * samples[0], self.mini_batch_size, self.trainer.world_size)

    def remember(self, outcomes: Outcomes, experience: Experience) -> dict[str, float]:
        """What outlives the iteration: records, the critic's store, the curriculum; what to log of it."""
        return self.advantage.learn(outcomes) | self.remember_outcomes(experience)


def total(policy_loss: Tensor, kl_coef: float, kl_loss: Tensor | None, *critic_losses: Tensor | None) -> Tensor:
    """What is minimised: the policy's loss, the critic's where there are any, and `kl_coef · KL`."""
    loss = sum((term for term in critic_losses if term is not None), start=policy_loss)
    return loss if kl_loss is None else loss + kl_coef * kl_loss
