"""Callbacks of runs that are compared: a budget of training time or of tokens, and the critic's share of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import RolloutGeneration, RunSummary
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.engines.engine import Response
from sppo_lightning.evaluation import by_dataset
from sppo_lightning.memory import peak_memory
from sppo_lightning.resuming import validate_in_fit


class TimedValidation(Callback):
    """Validates every so many seconds of training, and ends the run after `seconds` of it.

    It stands behind RunSummary, whose clock it reads.

    Args:
        seconds: Training time of the run.
        every_seconds: Training time from one validation to the next.
    """

    def __init__(self, seconds: float, every_seconds: float) -> None:
        self.seconds = seconds
        self.every_seconds = every_seconds
        self._next = every_seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock."""
        [summary] = [callback for callback in trainer.callbacks if isinstance(callback, RunSummary)]  # type: ignore[attr-defined]
        if summary.training_seconds >= self.seconds:
            trainer.should_stop = True  # RunSummary validates once more at the end
        elif summary.training_seconds >= self._next:
            self._next = summary.training_seconds + self.every_seconds
            validate_in_fit(trainer)


class CriticClock(Callback):
    """Writes how long the critic's forwards and backwards took, in training alone, to a JSON file when `fit` ends.

    A backward begins when the gradient of the critic's output is known and ends with the last of its parameters':
    the critic's part of a loss is the last that was computed, so autograd works through it in one go. Exact on a
    CPU; on a GPU, whose kernels run later, it counts the launches.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seconds = {"forward": 0.0, "backward": 0.0}
        self._forward_start = 0.0
        self._backward_mark: float | None = None  # until where the running backward is counted
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the critic, if there is one."""
        critic: Any = getattr(pl_module, "critic", None)
        if critic is None:
            return
        self._handles = [
            critic.register_forward_pre_hook(lambda *_: self._start_forward()),
            critic.register_forward_hook(lambda _, __, output: self._end_forward(trainer, output)),
            *(p.register_post_accumulate_grad_hook(self._note) for p in critic.parameters() if p.requires_grad),
        ]

    def _start_forward(self) -> None:
        self._forward_start, self._backward_mark = time.perf_counter(), None

    def _end_forward(self, trainer: Trainer, output: Any) -> None:
        if trainer.training:
            self.seconds["forward"] += time.perf_counter() - self._forward_start
        if output.requires_grad:
            output.register_hook(self._start_backward)

    def _start_backward(self, gradient: Any) -> None:
        if self._backward_mark is None:  # replayed prompts have an output of their own in the same backward
            self._backward_mark = time.perf_counter()

    def _note(self, parameter: Any) -> None:
        now = time.perf_counter()
        self.seconds["backward"] += now - (self._backward_mark or now)
        self._backward_mark = now

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        for handle in self._handles:
            handle.remove()
        self.path.write_text(json.dumps(self.seconds))


class TrainingMemory(Callback):
    """Writes the peak memory of the process in training alone, in MB, and what it was before the first iteration.

    Validation samples more responses at once than an iteration does, and would hide it. Linux only.

    Args:
        path: The file, JSON.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.megabytes = {"before": 0.0, "peak": 0.0}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the peak that a validation has left; the first one comes before the first iteration."""
        Path("/proc/self/clear_refs").write_text("5")
        if not self.megabytes["before"]:
            self.megabytes["before"] = peak_memory()["peak_mb"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the iteration's peak; it stands before what validates."""
        self.megabytes["peak"] = max(self.megabytes["peak"], peak_memory()["peak_mb"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self.path.write_text(json.dumps(self.megabytes))


class CountingEngine(HFEngine):
    """HFEngine that counts the tokens that it generates, whatever they are for."""

    tokens = 0

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """See `Engine.stream`."""
        for response in super().stream(batch, sampling):
            self.tokens += len(response.token_ids)
            yield response


class TokenClock(Callback):
    """Validates every so many tokens that training has generated, and ends the run after `tokens` of them.

    All tokens count, those of searches and of extra samples too, and those of validations do not. It stands behind
    RunSummary, whose clock it reads, and needs a CountingEngine. Each validation's iteration, seconds, tokens and
    accuracy by data set are written to a JSON file.

    Args:
        tokens: Generated in training, after which the run ends.
        every_tokens: From one validation to the next.
        enough: Accuracy on the validation set `hardest` at which it ends sooner.
        hardest: Its name.
        path: The file.
    """

    def __init__(
        self, tokens: int, every_tokens: int, enough: float, hardest: str, path: str = "progress.json"
    ) -> None:
        self.budget = tokens
        self.every_tokens = every_tokens
        self.enough = enough
        self.hardest = hardest
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self.iterations = 0
        self._not_training = 0  # tokens of validations
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what is read."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        [self._summary] = [each for each in callbacks if isinstance(each, RunSummary)]
        self._engine: Any
        [self._engine] = [each.engine for each in callbacks if isinstance(each, RolloutGeneration)]

    @property
    def generated(self) -> int:
        """Tokens, in training."""
        return self._engine.tokens - self._not_training

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was generated before."""
        self._before = self._engine.tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the validation has shown."""
        self._not_training += self._engine.tokens - self._before
        accuracy = by_dataset(trainer.callback_metrics, r"avg@\d+")
        seconds = self._summary.training_seconds
        row = {"iteration": self.iterations, "seconds": seconds, "tokens": self.generated}
        self.rows.append({**row, "accuracy": accuracy})
        trainer.should_stop |= self.iterations > 0 and accuracy[self.hardest] >= self.enough
        self.path.write_text(json.dumps(self.rows))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the counter; RunSummary validates once more at the end."""
        self.iterations += 1
        if self.generated >= self.budget:
            trainer.should_stop = True
        elif self.generated >= len(self.rows) * self.every_tokens:
            validate_in_fit(trainer)
