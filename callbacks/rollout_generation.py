"""The first stage: sample responses to the prompts of the batch."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.engines import Engine, HFEngine, ProcessEngine, Sampling
from sppo_lightning.engines.engine import Response, collect
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.pipeline import Stage
from sppo_lightning.sampling_ahead import Sampled, SamplingAhead
from sppo_lightning.torch_settings import TorchSettings

_OFFERED_AT_ONCE = 16  # finished responses: few enough to begin soon, many enough to be worth a call


class RolloutGeneration(Stage):
    """Samples responses with an engine and puts them on the batch as `batch.rollouts`.

    With `prefetch`, responses to the next batch are sampled while this one is learned from: by the weights from
    before its updates, so that they are always one iteration old (`rollout/staleness_updates`). The module
    corrects for it by truncated importance weights.

    Args:
        sampling: How training responses are sampled.
        validation: How responses are sampled in validate, test and predict; as in training when left out.
        greedy: Add one greedy response per training prompt, as `batch.greedy_rollouts`.
        validation_greedy: Add one greedy response per prompt in validate, test and predict.
        sample_from: Whose weights sample the training responses: the `policy`, or the `reference`, which
            ReferenceRefresh lets follow it at a distance. The ratio is then taken against the sampler.
        engine: What samples; the transformers model in the trainer's process by default.
        prefetch: Batches that are sampled ahead, 0 or 1: 0 is exactly on-policy. An engine that samples in the
            trainer's process does it in a process of its own, with half of the machine's cores.
    """

    provides = frozenset({"rollouts"})
    phase = "rollout"
    rewinds = True  # its state is that from before the batch at hand

    def __init__(
        self,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        validation: Sampling | None = None,
        greedy: bool = False,
        validation_greedy: bool = False,
        sample_from: Literal["policy", "reference"] = "policy",
        engine: Engine | None = None,
        prefetch: int = 0,
    ) -> None:
        if prefetch not in (0, 1):
            raise InputError(
                f"`RolloutGeneration.prefetch`={prefetch} would let responses grow older than one iteration; use "
                "1, or 0 to sample from the present weights."
            )
        self.sampling = sampling
        self.validation = validation or sampling
        self.greedy = greedy
        self.validation_greedy = validation_greedy
        self.sample_from = sample_from
        self.engine = engine or HFEngine()
        self.prefetch = prefetch
        self._ahead = SamplingAhead() if prefetch else None
        self._elsewhere: Engine | None = None  # what samples ahead
        self.begin()

    @property
    def needs_reference(self) -> bool:
        """Whether the reference must be loaded."""
        return self.sample_from == "reference"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the machine's cores with the process that samples ahead."""
        super().setup(trainer, pl_module, stage)
        if not self.prefetch or stage != "fit" or self._elsewhere is not None:
            return
        if self.engine.samples_elsewhere:
            self._elsewhere = self.engine
            return
        cores = max(1, len(os.sched_getaffinity(0)) // trainer.world_size)
        ours = min(torch.get_num_threads(), max(1, cores - cores // 2))
        self._elsewhere = ProcessEngine(self.engine, threads=max(1, cores // 2))
        if trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(ours)
            rank_zero_info(f"CPU threads: {ours} to learn, {max(1, cores // 2)} to sample ahead")

    def begin(self) -> None:
        """Count the tokens and the seconds of a new batch."""
        self._tokens, self._seconds = 0.0, 0.0
        self._ages: list[torch.Tensor] = []  # updates since each response's weights

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Set `batch.rollouts`, and `batch.greedy_rollouts` where asked for, while the critic reads the prompts."""
        training = bool(trainer.training)
        sampling = self.sampling if training else self.validation
        with trainer.precision_plugin.forward_context(), module.foreseeing(batch):  # type: ignore[operator]
            sampled = self._ahead.take(batch) if self._ahead and training else None
            if self._ahead and training and (upcoming := batch.upcoming) is not None:
                assert self._elsewhere is not None
                sample = self._sampler(self._elsewhere, trainer, module)
                self._ahead.start(upcoming, sample, TorchSettings.here(module.device))
            if sampled is None:
                if self._ahead is not None and self._elsewhere is self.engine:
                    self._ahead.wait()  # before it is given other weights
                sampled = self._sampler(self.engine, trainer, module)(batch)
            batch.rollouts = collect(sampled.responses, batch, sampling, module.policy)  # type: ignore[arg-type]
            if sampled.greedy is not None:
                batch.greedy_rollouts = collect(sampled.greedy, batch, _greedy(sampling), module.policy)  # type: ignore[arg-type]
        self._seconds += sampled.seconds
        self._ages.append(trainer.global_step - batch.rollouts.policy_versions)
        for rollouts in (batch.rollouts, batch.greedy_rollouts):
            self._tokens += 0.0 if rollouts is None else float(rollouts.response_mask.sum())

    def probe(self, batch: PromptBatch, sampling: Sampling, trainer: Trainer, module: Any) -> Rollouts:
        """Responses of the training engine with the present weights, beside those that are learned from."""
        if self._ahead is not None:
            self._ahead.wait()
        engine = self._elsewhere or self.engine
        with trainer.precision_plugin.forward_context():
            self._give_weights(engine, trainer, module)
            return engine.generate(batch, sampling)

    def _give_weights(self, engine: Engine, trainer: Trainer, module: Any) -> None:
        if trainer.training and self.sample_from == "reference":
            engine.update_weights(module.reference, module.reference_version)
        else:
            engine.update_weights(module.policy, trainer.global_step)

    def _sampler(self, engine: Engine, trainer: Trainer, module: Any) -> Callable[[PromptBatch], Sampled]:
        """Give the engine the present weights; a function that samples a batch from them."""
        self._give_weights(engine, trainer, module)
        sampling = self.sampling if trainer.training else self.validation
        greedy = self.greedy if trainer.training else self.validation_greedy
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        early = [callback for callback in callbacks if getattr(callback, "scores_early", False)]

        def sample(batch: PromptBatch) -> Sampled:
            def responses(sampling: Sampling) -> list[Response]:
                return list(_offered(engine.stream(batch, sampling), batch, sampling, module.policy, early))

            start = time.perf_counter()
            sampled, once = responses(sampling), responses(_greedy(sampling)) if greedy else None
            return Sampled(sampled, once, time.perf_counter() - start)

        return sample

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Log lengths, truncation, age and speed of this iteration's responses, on all ranks."""
        rollouts = batch.rollouts
        if rollouts is None:  # supervised learning samples nothing
            return
        if self._ahead is not None:
            self._ahead.learned()
        # the speed counts all that was sampled: greedy responses, and those that were replaced
        ages = torch.cat(self._ages)
        row = [float(rollouts.response_mask.sum()), rollouts.finish_reasons.count("length"), len(rollouts)]
        row += [self._tokens / max(self._seconds, 1e-9), self._seconds, float(ages.sum()), len(ages)]
        sums = trainer.strategy.reduce(torch.tensor(row, device=pl_module.device), reduce_op="sum")
        tokens, truncated, count, speed, seconds, age, sampled = sums.tolist()
        metrics = {
            "rollout/response_tokens_mean": tokens / max(count, 1),
            "rollout/truncated_fraction": truncated / max(count, 1),
            "rollout/tokens_per_second": speed,
            "rollout/seconds": seconds / trainer.world_size,  # of sampling, whoever waited for it
        }
        if self.prefetch:
            metrics["rollout/staleness_updates"] = age / max(sampled, 1)
        pl_module.log_dict(metrics)

    def state_dict(self) -> dict[str, Any]:
        """What was sampled ahead, on all ranks."""
        return {} if self._ahead is None else self._ahead.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what had been sampled when the checkpoint was saved."""
        if self._ahead is not None and state_dict:
            self._ahead.load_state_dict(state_dict)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the process that samples ahead, and the engine."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same; Lightning skips `teardown` after an exception."""
        self._close()

    def _close(self) -> None:
        for engine in (self._elsewhere, self.engine):
            if engine is not None:
                engine.close()
        if self._ahead is not None:
            self._ahead.close()


def _offered(
    responses: Iterator[Response],
    batch: PromptBatch,
    sampling: Sampling,
    policy: CausalLMPolicy,
    verifiers: Sequence[Any],
) -> Iterator[Response]:
    """The responses as they come; some at a time are also given to verifiers that begin early."""
    while group := list(itertools.islice(responses, _OFFERED_AT_ONCE)):
        if verifiers:
            rollouts = collect(group, batch, sampling, policy)
            for verifier in verifiers:
                verifier.score_early(rollouts)
        yield from group


def _greedy(sampling: Sampling) -> Sampling:
    """One response per prompt, its most likely tokens."""
    return dataclasses.replace(sampling, temperature=0.0, samples_per_prompt=1)
