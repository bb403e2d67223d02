"""A training budget in seconds of training, validation left out, for runs that are compared by the clock."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.callbacks import RunSummary
from sppo_lightning.callbacks.initial_validation import validate_in_fit


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
