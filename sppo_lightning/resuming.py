"""What a resumed run needs besides Lightning's own state, to be the undisturbed one from there on."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from sppo_lightning.preemption import Preemption
from sppo_lightning.ranks import gather_objects, rank_and_ranks


class ResumableModule(LightningModule):
    """A LightningModule whose checkpoints are exact, also where they are saved in the middle of a batch.

    A checkpoint holds besides: the states of the random number generators of all ranks, and what the iteration
    logged, which a kill may keep from the loggers. One that is saved while a batch is sampled, scored or validated
    holds the counters, the position in the data and the callbacks' states from before, so that a resumed run
    repeats the batch or the validation. A validation that was due when it was saved comes first.
    """

    preemption: Preemption | None = None  # where a callback saves when the run is asked to end

    def __init__(self) -> None:
        super().__init__()
        self._boundary: dict[str, Any] | None = None  # what was not yet saved behind the last iteration
        self._is_validating = False
        self._loaded: dict[str, Any] = {}

    @property
    def _is_in_batch(self) -> bool:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return self._is_validating or progress.ready != progress.started

    @property
    def saves_exactly(self) -> bool:
        """Whether a checkpoint can be saved now; not before the first iteration since the start or the resume."""
        return self._boundary is not None or not self._is_in_batch

    def on_train_start(self) -> None:
        """Restore the random numbers, log what a kill may have kept from the loggers, make up for a validation."""
        loaded, self._loaded = self._loaded, {}
        self._boundary = None
        if not loaded:
            return
        rank, ranks = rank_and_ranks()
        if len(loaded["random"]) == ranks:
            _set_random_state(loaded["random"][rank])
        if loaded["logged"]:
            self.trainer._logger_connector.log_metrics(dict(loaded["logged"]))
        fit_loop, loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end:
            fetcher: Any = fit_loop._data_fetcher
            if loop._should_check_val_fx(fetcher):
                epochs = fit_loop.epoch_progress.current
                completed, epochs.completed = epochs.completed, loaded["epoch"]  # which it is logged with
                validate_in_fit(self.trainer)
                epochs.completed = completed
            if fit_loop.restarted_mid_epoch and loop.batch_progress.is_last_batch:
                # Lightning goes on with the next epoch without counting its start: a second resume repeats it
                fit_loop.reset_restart_stage()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Forget what the iteration before logged: what is not measured anew would be logged again."""
        results = self.trainer._results if self.trainer.training else None
        for result in [] if results is None else results.values():
            if not result.meta.on_epoch:
                result.reset()
        return batch

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note what a checkpoint is made of that is saved before the next iteration has learned anything."""
        self._boundary = self._parts()

    def on_validation_start(self) -> None:
        """From here on a checkpoint repeats the validation."""
        self._is_validating = True

    def on_validation_epoch_end(self) -> None:
        """From here on it does not."""
        self._is_validating = False

    def on_validation_end(self) -> None:
        """As after an iteration."""
        if self._boundary is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._boundary = self._parts()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out; put back what a batch has moved that was not learned from."""
        connector = self.trainer._logger_connector
        metrics: dict[str, Any] = connector.metrics["log"] if self.trainer.training else {}
        logged = {name: float(value) for name, value in metrics.items()} if connector.should_update_logs else {}
        if logged:
            logged["epoch"] = float(self.trainer.current_epoch)
        own = {"random": gather_objects(_random_state()), "logged": logged, "epoch": self.trainer.current_epoch}
        if self._boundary is not None and self._is_in_batch:
            boundary = copy.deepcopy(self._boundary)
            checkpoint["loops"]["fit_loop"] = boundary["fit_loop"]
            checkpoint.get("callbacks", {}).update(boundary["callbacks"])
            checkpoint.update(boundary["data"])
            own = {"random": gather_objects(boundary["random"]), "logged": {}, "epoch": boundary["epoch"]}
        checkpoint["resuming"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._loaded = checkpoint.get("resuming", {})

    def _parts(self) -> dict[str, Any]:
        trainer = self.trainer
        data: Any = getattr(trainer, "datamodule", None)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        states = {
            callback.state_key: callback.state_dict()
            for callback in callbacks
            # those that save are not moved by a batch, and must say what they are about to save
            if not isinstance(callback, Checkpoint) and not getattr(callback, "rewinds", False)
        }
        parts = {
            "fit_loop": trainer.fit_loop.state_dict(),
            "callbacks": {key: state for key, state in states.items() if state},
            "data": {} if data is None or not (state := data.state_dict()) else {type(data).__qualname__: state},
            "random": _random_state(),
            "epoch": trainer.current_epoch,
        }
        return copy.deepcopy(parts)


def _random_state() -> dict[str, Any]:
    """The rank's own, in types that load without the right to run code."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [name, np.asarray(keys).tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def starts_afresh(trainer: Trainer) -> bool:
    """Whether this `fit` is about to make its first update ever, and goes on from no checkpoint."""
    return not (trainer.ckpt_path or trainer.global_step or trainer.fit_loop.restarting)


def validate_in_fit(trainer: Trainer) -> None:
    """Run the validation loop in the middle of `fit`, with the state changes that Lightning's own makes."""
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    trainer.validating = True  # picks the loop that `self.log` writes to
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
