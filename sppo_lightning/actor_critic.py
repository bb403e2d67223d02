"""The models of a reinforcement learning run: policy, critic and reference, and the optimizer that moves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sppo_lightning.base import PolicyModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.batching import micro_batches
from sppo_lightning.models import CausalLMPolicy, Critic
from sppo_lightning.objectives import ValueLoss
from sppo_lightning.optim import GroupOptimizer, Schedule, build_optimizer
from sppo_lightning.warmup import CriticWarmup


class ActorCritic(PolicyModule):
    """Builds, optimizes and checkpoints policy, critic and reference; `SPPOModule` says what they learn."""

    def __init__(
        self,
        policy: CausalLMPolicy,
        critic: Critic | None,
        critic_objective: ValueLoss,
        critic_warmup: CriticWarmup | None,
        policy_optimizer: GroupOptimizer,
        critic_optimizer: GroupOptimizer,
        lr_schedule: Schedule,
        warmup_updates: int,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__(policy)
        self.critic = critic
        self.critic_objective = critic_objective
        self.critic_warmup = critic_warmup
        self.reference: CausalLMPolicy | None = None
        self.reference_version = 0  # `trainer.global_step` of the reference's weights; -1 for a mixture of several
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.lr_schedule = lr_schedule
        self.warmup_updates = warmup_updates
        self.micro_batch_tokens = micro_batch_tokens

    @property
    def needs_reference(self) -> bool:
        """Whether something uses the reference: only then is it loaded."""
        callbacks: list[Any] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return any(getattr(callback, "needs_reference", False) for callback in callbacks)

    def configure_model(self) -> None:
        """Load policy and critic, and the policy's own reference if something uses it."""
        super().configure_model()
        if self.critic is not None:
            self.critic.build()
            self.critic.check_policy(self.policy)
        if self.reference is None and self.needs_reference:
            self.reference = self.policy.as_reference()

    def trained_modules(self) -> dict[str, tuple[nn.Module, GroupOptimizer]]:
        """What is trained, by metric name, with its optimizer settings."""
        modules: dict[str, tuple[nn.Module, GroupOptimizer]] = {"policy": (self.policy, self.policy_optimizer)}
        if self.critic is not None:
            modules["critic"] = (self.critic, self.critic_optimizer)
        return modules

    def moving_modules(self) -> dict[str, tuple[nn.Module, GroupOptimizer]]:
        """What this update moves: all that is trained, but not the policy while the critic warms up."""
        modules = self.trained_modules()
        if self.critic_warmup is not None and self.critic_warmup.running:
            modules.pop("policy")
        return modules

    def configure_optimizers(self) -> Any:
        """One AdamW with a group per module, so `trainer.global_step` counts updates once."""
        optimizer, schedule = build_optimizer(
            self.trained_modules(), self.lr_schedule, self.warmup_updates, self.trainer.max_steps
        )
        return [optimizer], [schedule]

    @torch.no_grad()
    def prompt_values(self, batch: PromptBatch) -> Tensor | None:
        """The critic's chance of success for each prompt, `[B]`, without gradient; None without a critic."""
        if self.critic is None:
            return None
        lengths = self.critic.prompt_lengths(batch.prompts, batch.token_ids)
        groups = micro_batches(lengths, self.micro_batch_tokens)
        parts = [
            self.critic.prompt_outputs([batch.prompts[i] for i in g], [batch.token_ids[i] for i in g])
            for g in groups
        ]
        order = torch.tensor([i for group in groups for i in group], device=self.device)
        return self.critic_objective.predict(torch.cat(parts))[order.argsort()]

    @torch.no_grad()
    def refresh_reference(self, mix: float = 1.0) -> None:
        """`reference ← mix · policy + (1 − mix) · reference`, in place."""
        assert self.reference is not None
        for old, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
            old.lerp_(new, mix)
        self.reference_version = self.trainer.global_step if mix == 1 else -1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what decides the future and is no tensor of a module."""
        checkpoint["reference_version"] = self.reference_version
        if self.critic_warmup is not None:
            checkpoint["critic_warmup"] = self.critic_warmup.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        self.reference_version = checkpoint.get("reference_version", 0)
        if self.critic_warmup is not None and "critic_warmup" in checkpoint:
            self.critic_warmup.load_state_dict(checkpoint["critic_warmup"])
