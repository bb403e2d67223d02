"""Supervised fine-tuning on demonstrations: the warm start that reinforcement learning builds on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sppo_lightning.base import PolicyModule
from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.batching import MicroRows
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.sharding import is_sharded
from sppo_lightning.optim import GroupOptimizer, Schedule, build_optimizer
from sppo_lightning.phases import phase
from sppo_lightning.skipping import Attempt
from sppo_lightning.step_metrics import count_padding


class SFTModule(PolicyModule):
    """Trains a policy on demonstrations: cross-entropy on the response's tokens, the prompt's left out.

    The data set needs a demonstration per prompt (a `response` or `completion` column, or chat messages that end in
    one). Validation logs the same loss of the demonstrations that it finds as `val/<dataset>/sft_loss`, in nats per
    token, and samples and scores responses by the stages of reinforcement learning, where these are listed.

    Args:
        policy: The model that is trained.
        optimizer: Learning rate and its warm-up, weight decay and gradient clip.
        lr_schedule: How the learning rate goes on after its warm-up, in updates.
        micro_batch_tokens: Token budget of one forward and backward on one rank, padding included.
        max_skipped_updates: Updates in a row that may be skipped because a number is not finite; after so many the
            run stops, with a checkpoint. 1 stops at the first one, null never.
    """

    imitates = True

    def __init__(
        self,
        policy: CausalLMPolicy,
        optimizer: GroupOptimizer = GroupOptimizer(lr=1e-5),  # noqa: B008 (frozen)
        lr_schedule: Schedule = "constant",
        micro_batch_tokens: int = 16384,
        max_skipped_updates: int | None = 5,
    ) -> None:
        super().__init__(policy, max_skipped_updates)
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.micro_batch_tokens = micro_batch_tokens
        self._losses: dict[int, Tensor] = {}  # [2] by validation set: sum over tokens, nats, and tokens

    @phase("`update`")
    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One update: mean negative log-likelihood of the demonstrations' tokens, over all ranks."""
        start = time.perf_counter()
        examples = self.demonstrations(batch)
        attempt = Attempt(examples)
        count = examples.response_mask.sum()
        tokens = self.trainer.strategy.reduce(count, reduce_op="sum").clamp(min=1.0)
        for [rows], _, last in self.in_step(self.groups(examples.lengths, self.policy.packs)):
            log_probs, mask, entropy = self.imitation(examples, rows)
            self.accumulate(-log_probs[mask].sum() / tokens, last)
            attempt.check_log_probs(rows.index, log_probs, mask)  # whose mean is the loss
            attempt.add("sft/loss", -log_probs[mask].mean(), mask.sum())
            attempt.add("policy/entropy", entropy[mask].mean(), mask.sum())
            count_padding(attempt, examples.rows(rows.index), self.policy.packs)
        if self.step_optimizer(self.trained_modules(), attempt):  # unless a number is not finite
            for name, value in attempt.means(self.trainer.strategy).items():
                self.log(name, value, prog_bar=name == "sft/loss")
        self.end_iteration(len(examples), time.perf_counter() - start)

    def imitation(self, examples: Rollouts, rows: MicroRows) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities `[n, T]` of the rows' demonstrations, nats, the mask of those that count, entropies."""
        log_probs, entropy = self.policy(examples.rows(rows.index))
        return log_probs, examples.response_mask[rows.index].bool() & rows.counts, entropy

    def demonstrations(self, batch: PromptBatch) -> Rollouts:
        """The batch's demonstrations as responses, each closed by the end-of-sequence token."""
        missing = [p for p in batch.prompts if p.demonstration is None]
        if missing:
            raise InputError(
                f"Row {missing[0].row} of the data set {missing[0].dataset!r} has no demonstration to learn from; "
                "SFTModule needs a `response` or `completion` column (or name it in `columns`)."
            )
        tokenizer = self.policy.tokenizer
        texts = [str(p.demonstration) for p in batch.prompts]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        responses = [closed(row, self.policy.eos_token_ids, tokenizer.eos_token_id) for row in ids]
        return pack_rollouts(
            batch,
            list(range(len(batch))),
            responses,
            [[0.0] * len(row) for row in responses],
            ["stop"] * len(responses),
            policy=self.policy,
            temperature=1.0,
            versions=[self.trainer.global_step] * len(batch),
        )

    # ------------------------------------------------------------------ validation

    def needs(self, stage: str) -> frozenset[str]:
        """Nothing to validate by the loss alone, where no stage samples."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if stage != "predict" and not any("rollouts" in getattr(each, "provides", ()) for each in callbacks):
            return frozenset()
        return super().needs(stage)

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the batch's scored responses, where there are any, and the loss of its demonstrations."""
        if batch.rollouts is not None:
            super().validation_step(batch, batch_idx, dataloader_idx)
        self._add_loss(batch, dataloader_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    @torch.no_grad()
    @phase("validation")
    def _add_loss(self, batch: PromptBatch, dataset: int) -> None:
        """Add the negative log-likelihood of the demonstrations that the batch has; a collective where sharded."""
        shown = [i for i, prompt in enumerate(batch.prompts) if prompt.demonstration is not None]
        examples = self.demonstrations(batch.rows(shown) if shown else self._stand_in())
        groups = self.groups(examples.lengths if shown else [], self.policy.packs)
        micro = [MicroRows(group, True) for group in groups]
        if is_sharded(self.policy):  # every forward gathers weights
            micro = [rows for [rows], _, _ in self.in_step(groups)]
        for rows in micro:
            log_probs, mask, _ = self.imitation(examples, rows)
            found = torch.stack([-log_probs[mask].double().sum(), mask.sum().double()])
            self._losses[dataset] = self._losses.get(dataset, 0.0) + found

    def _stand_in(self) -> PromptBatch:
        """A row for a rank that has none, where others cannot compute without it."""
        end, token = self.policy.tokenizer.eos_token_id, str(self.policy.tokenizer.eos_token)
        return PromptBatch([Prompt(token, "", "", 0, demonstration=token)], [[end]], [0])

    def more_metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The loss per token of each data set's demonstrations, over all ranks; nothing of a set without any."""
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)  # losses, tokens
        for dataset, own in self._losses.items():
            sums[dataset] = own
        self._losses = {}
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum").cpu()
        found = dict(zip(names, sums, strict=True)) | ({"all": sums.sum(0)} if len(names) > 1 else {})
        return {f"val/{name}/sft_loss": float(loss / tokens) for name, (loss, tokens) in found.items() if tokens}

    # ------------------------------------------------------------------ the run around the step

    def trained_modules(self) -> dict[str, tuple[nn.Module, GroupOptimizer]]:
        """The policy and its optimizer settings."""
        return {"policy": (self.policy, self.optimizer)}

    def configure_optimizers(self) -> Any:
        """AdamW on the policy."""
        optimizer, schedule = build_optimizer(self.trained_modules(), self.lr_schedule, self.trainer.max_steps)
        return [optimizer], [schedule]


def closed(token_ids: list[int], ends: Sequence[int], end: int) -> list[int]:
    """The ids up to the first of `ends`, where sampling would stop; with `end` behind them where there is none."""
    first = next((place for place, token in enumerate(token_ids) if token in ends), None)
    return [*token_ids, end] if first is None else token_ids[: first + 1]
