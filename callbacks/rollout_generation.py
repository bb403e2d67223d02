"""The first stage: sample responses to the prompts of the batch."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines import Engine, HFEngine, Sampling
from sppo_lightning.pipeline import Stage


class RolloutGeneration(Stage):
    """Samples responses with an engine and puts them on the batch as `batch.rollouts`.

    Args:
        sampling: How training responses are sampled.
        validation: How responses are sampled in validate, test and predict; as in training when left out.
        greedy: Add one greedy response per training prompt, as `batch.greedy_rollouts`.
        validation_greedy: Add one greedy response per prompt in validate, test and predict.
        sample_from: Whose weights sample the training responses: the `policy`, or the `reference`, which
            ReferenceRefresh lets follow it at a distance. The ratio is then taken against the sampler.
        engine: What samples; the transformers model in the trainer's process by default.
    """

    provides = frozenset({"rollouts"})
    phase = "rollout"

    def __init__(
        self,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        validation: Sampling | None = None,
        greedy: bool = False,
        validation_greedy: bool = False,
        sample_from: Literal["policy", "reference"] = "policy",
        engine: Engine | None = None,
    ) -> None:
        self.sampling = sampling
        self.validation = validation or sampling
        self.greedy = greedy
        self.validation_greedy = validation_greedy
        self.sample_from = sample_from
        self.engine = engine or HFEngine()
        self._tokens = 0.0  # sampled for the batch at hand

    @property
    def needs_reference(self) -> bool:
        """Whether the reference must be loaded."""
        return self.sample_from == "reference"

    def begin(self) -> None:
        """Count the tokens of a new batch."""
        self._tokens = 0.0

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Set `batch.rollouts`, and `batch.greedy_rollouts` where asked for, while the critic reads the prompts."""
        sampling = self.sampling if trainer.training else self.validation
        with trainer.precision_plugin.forward_context(), module.foreseeing(batch):  # type: ignore[operator]
            if trainer.training and self.sample_from == "reference":
                self.engine.update_weights(module.reference, module.reference_version)  # type: ignore[arg-type]
            else:
                self.engine.update_weights(module.policy, trainer.global_step)  # type: ignore[arg-type]
            batch.rollouts = self.engine.generate(batch, sampling)
            if self.greedy if trainer.training else self.validation_greedy:
                once = dataclasses.replace(sampling, temperature=0.0, samples_per_prompt=1)
                batch.greedy_rollouts = self.engine.generate(batch, once)
        for rollouts in (batch.rollouts, batch.greedy_rollouts):
            self._tokens += 0.0 if rollouts is None else float(rollouts.response_mask.sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Log lengths, truncation and speed of this iteration's responses, on all ranks."""
        rollouts = batch.rollouts
        if rollouts is None:  # supervised learning samples nothing
            return
        seconds: float = pl_module.last_phase_seconds["rollout"]  # type: ignore
        # the speed counts all that was sampled: greedy responses, and those that were replaced
        row = [float(rollouts.response_mask.sum()), rollouts.finish_reasons.count("length"), len(rollouts)]
        sums = torch.tensor([*row, self._tokens / max(seconds, 1e-9)], device=pl_module.device)
        tokens, truncated, count, speed = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        pl_module.log_dict(
            {
                "rollout/response_tokens_mean": tokens / max(count, 1),
                "rollout/truncated_fraction": truncated / max(count, 1),
                "rollout/tokens_per_second": speed,
            }
        )
