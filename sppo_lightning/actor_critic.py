"""The models of a reinforcement learning run: policy, critic and reference, and the optimizer that moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppo_lightning.base import PolicyModule
from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.curriculum_step import teach_curriculum
from sppo_lightning.experience import Experience, Replayed
from sppo_lightning.models import CausalLMPolicy, Critic
from sppo_lightning.models.sharding import is_sharded
from sppo_lightning.objectives import ValueLoss
from sppo_lightning.optim import GroupOptimizer, Schedule, build_optimizer
from sppo_lightning.replay import CriticReplay
from sppo_lightning.torch_settings import TorchSettings
from sppo_lightning.warmup import CriticWarmup


class ActorCritic(PolicyModule):
    """Builds, optimizes and checkpoints policy, critic and reference; `SPPOModule` says what they learn."""

    with_state = (*PolicyModule.with_state, "critic_warmup", "critic_replay")

    def __init__(
        self,
        policy: CausalLMPolicy,
        critic: Critic | None,
        critic_objective: ValueLoss,
        critic_warmup: CriticWarmup | None,
        critic_replay: CriticReplay | None,
        policy_optimizer: GroupOptimizer,
        critic_optimizer: GroupOptimizer,
        lr_schedule: Schedule,
        micro_batch_tokens: int,
        max_skipped_updates: int | None,
    ) -> None:
        super().__init__(policy, max_skipped_updates)
        self.critic = critic
        self.critic_objective = critic_objective
        self.critic_warmup = critic_warmup
        self.critic_replay = critic_replay
        self.reference: CausalLMPolicy | None = None
        self.reference_version = 0  # `trainer.global_step` of the reference's weights; -1 for a mixture of several
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self.lr_schedule = lr_schedule
        self.micro_batch_tokens = micro_batch_tokens
        self.last_figures: dict[str, Any] = {}  # what the last iteration logged, without what only older ones did

    @property
    def needs_reference(self) -> bool:
        """Whether something uses the reference: only then is it loaded."""
        callbacks: list[Any] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        return any(getattr(callback, "needs_reference", False) for callback in callbacks)

    def build_models(self) -> None:
        """Load policy and critic, and the policy's own reference if something uses it."""
        super().build_models()
        if self.critic is not None:
            self.critic.build()
            self.critic.check_policy(self.policy)
        if self.reference is None and self.needs_reference:
            self.reference = self.policy.as_reference()

    def models(self) -> list[nn.Module]:
        """Policy, critic and a reference with weights of its own."""
        there = [model for model in (self.policy, self.critic, self.reference) if model is not None]
        return [model for model in there if next(model.parameters(), None) is not None]

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
        optimizer, schedule = build_optimizer(self.trained_modules(), self.lr_schedule, self.trainer.max_steps)
        return [optimizer], [schedule]

    def critic_values(self, batch: PromptBatch) -> tuple[Tensor | None, Tensor | None]:
        """Value logits `v` `[N]` of a critic that reads prompts, or values `[N, T]` of one that reads tokens."""
        critic, rollouts = self.critic, batch.rollouts
        assert rollouts is not None
        if critic is None:
            return None, None
        if critic.reads == "prompt":
            return self.value_logits(batch)[rollouts.prompt_index], None
        outputs = self._ask(critic.lengths(rollouts), lambda rows: critic.outputs(rollouts.rows(rows)))
        return None, self.critic_objective.predict(outputs)

    @torch.no_grad()
    def value_logits(self, batch: PromptBatch) -> Tensor:
        """The critic's output at the end of each prompt, `[B]`, without gradient; asked ahead, or else now."""
        assert self.critic is not None
        if batch.value_logits is not None:
            return batch.value_logits
        critic, prompts, ids = self.critic, batch.prompts, batch.token_ids
        if not prompts:
            if not is_sharded(critic):
                return torch.zeros(0, device=self.device)
            # other ranks cannot ask without this one
            end = self.policy.tokenizer.eos_token_id
            prompts, ids = [Prompt(str(self.policy.tokenizer.eos_token), "", "", 0)], [[end]]
        lengths = critic.prompt_lengths(prompts, ids)
        answers = self._ask(
            lengths, lambda rows: critic.prompt_outputs([prompts[i] for i in rows], [ids[i] for i in rows])
        )
        return answers[: len(batch)]

    def _ask(self, lengths: Sequence[int], outputs: Callable[[list[int]], Tensor]) -> Tensor:
        """`outputs` of all rows, whose lengths are given in tokens, group by group within the token budget."""
        groups = self.groups(lengths)
        assert self.critic is not None
        if is_sharded(self.critic):  # every forward gathers weights, so all ranks make as many
            groups = [rows.index for [rows], _, _ in self.in_step(groups)]
        first = outputs(groups[0])
        everything = first.new_empty(len(lengths), *first.shape[1:])
        everything[groups[0]] = first
        for group in groups[1:]:
            everything[group] = outputs(group)
        return everything

    @contextmanager
    def foreseeing(self, batch: PromptBatch) -> Iterator[None]:
        """Asks a critic that reads only prompts about the batch's, in a thread, while the caller samples.

        So V is there when the responses are, as `batch.value_logits`. A sharded critic is asked later: a thread
        would gather its weights in an order of its own.
        """
        batch.value_logits = None  # a batch may be used again, when the critic has learned
        asked = any(batch.first_samples)  # about prompts that have responses already
        if (
            self.critic is None
            or self.critic.reads != "prompt"
            or is_sharded(self.critic)
            or not len(batch)
            or asked
        ):
            yield
            return
        settings = TorchSettings.here(self.device)

        def ask() -> Tensor:
            with settings.precision():
                return self.value_logits(batch)

        with ThreadPoolExecutor(1, initializer=settings.adopt) as thread:
            answer = thread.submit(ask)
            yield
        batch.value_logits = answer.result()

    def value_loss(self, rows: Experience, counts: dict[str, Tensor]) -> Tensor | None:
        """The critic's loss on these rows, as their share of the mini-batch's; None without a critic."""
        if self.critic is None:
            return None
        assert rows.values is not None
        assert rows.targets is not None
        outputs = self.critic.outputs(rows.rollouts)
        kept, unit = (rows.verdicts, "sequences") if outputs.ndim == 1 else (rows.mask.bool(), "tokens")
        return self.critic_objective(outputs[kept], rows.values[kept], rows.targets[kept], counts[unit])

    def replayed(self, update: Experience) -> Replayed | None:
        """What the critic sees again in the next update; None where nothing asks for it."""
        return None if self.critic_replay is None else self.critic_replay.draw(update, self.trainer.global_step)

    def replayed_lengths(self, rows: Replayed | None) -> list[int]:
        """`M` numbers of tokens that the critic reads again."""
        if rows is None or self.critic is None:
            return []
        return self.critic.prompt_lengths(rows.prompts, rows.token_ids)

    def replay_loss(self, rows: Replayed | None, counts: dict[str, Tensor]) -> Tensor | None:
        """Weighted mean of the binary cross-entropy, as these rows' share of the mini-batch's; None without any."""
        if rows is None:
            return None
        assert self.critic is not None
        outputs = self.critic.prompt_outputs(rows.prompts, rows.token_ids)
        shares, targets = (rows.weights / counts["replayed"]).to(outputs), rows.targets.to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, targets, shares, reduction="sum")

    def remember_outcomes(self, experience: Experience) -> dict[str, float]:
        """Keep what the critic may see again, and teach the data's curriculum; what to log of the latter."""
        if self.critic_replay is not None:
            self.critic_replay.store(experience)
        return teach_curriculum(self, experience)

    def prompt_values(self, batch: PromptBatch) -> Tensor | None:
        """The critic's chance of success for each prompt, `[B]`, without gradient; None without a critic."""
        return None if self.critic is None else self.critic_objective.predict(self.value_logits(batch))

    @torch.no_grad()
    def refresh_reference(self, mix: float = 1.0) -> None:
        """`reference ← mix · policy + (1 − mix) · reference`, in place."""
        assert self.reference is not None
        for old, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
            old.lerp_(new, mix)
        self.reference_version = self.trainer.global_step if mix == 1 else -1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the reference's version too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_version"] = self.reference_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.reference_version = checkpoint.get("reference_version", 0)
