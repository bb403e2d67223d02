"""The check that the engine samples from the weights that are trained."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.module import SPPOModule
from sppo_lightning.ranks import gather_objects
from sppo_lightning.step_metrics import sampler_gaps

# Mean |Δ log p| per token, nats. Rounding moves a logit by its size (about 20) times the dtype's unit, and that is
# how far two kernels may be from each other: 2e-6 in float32, 0.01 in float16, 0.08 in bfloat16, less in the mean.
# Other weights are far beyond it, unless by one update of a small learning rate.
_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


class SamplerParity(Callback):
    """Compares the engine's log-probabilities with the trainer's, of a few responses sampled for it.

    In the first two iterations, also of a resumed run, and every so many: stale weights, another attention kernel
    or another precision show here before they spoil a run. The responses are sampled from the present
    weights, without top-k, top-p and min-p, and nothing is learned from them. Logs `sampler/parity_gap_mean` and
    `sampler/parity_gap_max`, in nats per token.

    Args:
        every_n_iterations: Iterations between two checks.
        max_gap: Largest mean difference per token that is no mistake, in nats; by the dtype that the policy
            computes in where left out: 0.001 in float32, 0.02 in float16, 0.05 in bfloat16.
        prompts: Of each rank's batch, how many get a response.
        max_new_tokens: Longest of these responses.
    """

    def __init__(
        self, every_n_iterations: int = 50, max_gap: float | None = None, prompts: int = 4, max_new_tokens: int = 64
    ) -> None:
        super().__init__()
        settings = {"every_n_iterations": every_n_iterations, "prompts": prompts, "max_new_tokens": max_new_tokens}
        for name, value in settings.items():
            if value < 1:
                raise InputError(f"`SamplerParity.{name}`={value} leaves nothing to compare; use 1 or more.")
        if max_gap is not None and not max_gap > 0:
            raise InputError(f"`SamplerParity.max_gap`={max_gap} allows no rounding; use a number above 0.")
        self.every_n_iterations = every_n_iterations
        self.max_gap = max_gap
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self._iterations = 0  # of this fit: a resumed one starts with a check

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whose engine is checked."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        stages = [callback for callback in callbacks if isinstance(callback, RolloutGeneration)]
        if not stages or callbacks.index(stages[0]) > callbacks.index(self):
            raise InputError(
                "`trainer.callbacks` lists SamplerParity, which checks the engine of RolloutGeneration, without "
                "one before it; list RolloutGeneration first, or remove SamplerParity."
            )
        if stage == "fit" and not isinstance(pl_module, SPPOModule):
            raise InputError(
                f"`trainer.callbacks` lists SamplerParity, and {type(pl_module).__name__} learns from no response "
                "that an engine sampled; remove SamplerParity."
            )
        self._generation = stages[0]
        self._iterations = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Check where it is time."""
        due = self._iterations % self.every_n_iterations == 0 or self._iterations == 1
        self._iterations += 1
        if due:
            self.check(trainer, pl_module, batch)

    @torch.no_grad()
    def check(self, trainer: Trainer, module: Any, batch: PromptBatch) -> None:
        """Sample, compare and log; a collective. Raises `InputError` for a gap beyond the bound."""
        few = batch.rows(range(min(self.prompts, len(batch))))
        temperature = self._generation.sampling.temperature or 1.0
        sampling = Sampling(temperature=temperature, max_new_tokens=self.max_new_tokens)
        rollouts = self._generation.probe(few, sampling, trainer, module)
        policy = module.reference if self._generation.sample_from == "reference" else module.policy
        with trainer.precision_plugin.forward_context():
            log_probs = module.frozen_log_probs(policy, rollouts, range(len(rollouts)))
            dtype = policy.compute_dtype
        gaps = sampler_gaps(log_probs, rollouts, rollouts.response_mask.bool()).double()
        parts = gather_objects((float(gaps.sum()), len(gaps), float(gaps.max()) if len(gaps) else 0.0))
        mean, largest = sum(p[0] for p in parts) / max(sum(p[1] for p in parts), 1), max(p[2] for p in parts)
        module.log_dict({"sampler/parity_gap_mean": mean, "sampler/parity_gap_max": largest})
        bound = _BOUNDS[dtype] if self.max_gap is None else self.max_gap
        if not mean <= bound:  # NaN is beyond any
            raise InputError(
                f"The log-probabilities of {type(self._generation.engine).__name__} and those of the trainer, in "
                f"{str(dtype)[6:]}, differ by {mean:.3g} nats per token (at most {largest:.3g}), "
                f"where `SamplerParity.max_gap` is {bound:g}: the engine samples from other weights, at another "
                "precision or by another attention; give it the policy's dtype and weights, or raise `max_gap` "
                "where the difference is wanted."
            )
