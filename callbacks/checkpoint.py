"""Checkpoints that survive a kill, a full disk and the loss of the machine."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sppo_lightning.checkpoint_search import newest_whole
from sppo_lightning.checkpoints import NotSaved, partial_path, publish, remove, together, write_together
from sppo_lightning.preemption import Preemption

_CHANGED = (  # before a checkpoint is saved, which holds it
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "newest_model_path",
    "previous_model_path",
)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for long runs: the newest state is never lost, and saving never ends a run.

    Without a `monitor`, the newest checkpoint is kept and the one before it, and `last.ckpt` is a link to the
    newest. `ckpt_path: last` goes on from the newest whole checkpoint in `dirpath`. Where one cannot be written,
    those before are kept, the run goes on, and `checkpoint/failures` counts it. On SIGTERM the run saves and ends
    with status 143.

    Args:
        dirpath: Folder of the checkpoints; the same at every start: `checkpoints` in `trainer.default_root_dir`.
        save_last: `link`: `last.ckpt` leads to the newest checkpoint; true: it is a second copy; false: there is
            none.
        **settings: ModelCheckpoint's: `every_n_train_steps` counts updates, `train_time_interval` is looked at
            after each iteration.
    """

    def __init__(
        self, dirpath: str | None = None, save_last: bool | Literal["link"] | None = "link", **settings: Any
    ) -> None:
        super().__init__(dirpath=dirpath, save_last=save_last, **settings)
        self.failures = 0  # checkpoints that could not be written
        self.previous_model_path = ""  # without a `monitor`, the one before the newest
        self.newest_model_path = ""  # the newest one, where it is kept for that alone
        self._failed_at: int | None = None  # `global_step`
        self._preemption: Preemption | None = None

    # ------------------------------------------------------------------ with the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder."""
        self.dirpath = self._folder(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM."""
        if getattr(pl_module, "preemption", None) is None and not self.save_weights_only:
            self._preemption = Preemption(trainer, lambda: self._save_before_end(trainer, pl_module))
            pl_module.preemption = self._preemption  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave SIGTERM to Lightning again."""
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = pl_module.preemption = None  # type: ignore[assignment]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As ModelCheckpoint, and as in `teardown`, which Lightning skips after an exception."""
        self.teardown(trainer, pl_module, "fit")
        with self._as_before_on_failure(trainer):
            super().on_exception(trainer, pl_module, exception)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; end the run if it was asked to."""
        pl_module.log("checkpoint/failures", float(self.failures))
        if self._is_due(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)
            else:
                self._defer_save_until_validation = True
        if self._preemption is not None:
            self._preemption.stop_if_requested()

    def _is_due(self, trainer: Trainer) -> bool:
        if self._train_time_interval is not None:
            assert self._last_time_checked is not None  # since training started
            waited = time.monotonic() - self._last_time_checked
            due = trainer.strategy.broadcast(waited >= self._train_time_interval.total_seconds())
            self._last_time_checked += waited if due else 0.0
            return due
        return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0

    def _save_before_end(self, trainer: Trainer, module: Any) -> None:
        if self._should_skip_saving_checkpoint(trainer) or not getattr(module, "saves_exactly", True):
            rank_zero_info("There is nothing that is not in a checkpoint yet.")
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None:
            self._save_topk_checkpoint(trainer, candidates)
        if self._failed_at != trainer.global_step:
            self._save_newest(trainer, candidates)

    # ------------------------------------------------------------------ what is kept

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._as_before_on_failure(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, self.best_model_path)
        oldest = self.previous_model_path
        # before it is saved, since these are part of it
        self.previous_model_path, self.best_model_path = self.best_model_path, path
        self._save_checkpoint(trainer, path)
        if self.save_top_k == 1:
            self._remove_outdated(trainer, oldest, path)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._failed_at == trainer.global_step:  # the disk that had no room a moment ago has none now
            return
        if self.save_last == "link":
            self._save_newest(trainer, monitor_candidates)
        else:
            with self._as_before_on_failure(trainer):
                super()._save_last_checkpoint(trainer, monitor_candidates)

    def _save_newest(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        """Save the present state where it was not among the best, and let `last.ckpt` lead to it."""
        with self._as_before_on_failure(trainer):
            outdated, self.newest_model_path = self.newest_model_path, ""
            if self._last_global_step_saved != trainer.global_step:
                path = self._get_metric_interpolated_filepath_name(candidates, trainer)
                self.newest_model_path = path
                self._save_checkpoint(trainer, path)
            if self.save_last == "link":
                assert self.dirpath is not None
                self.last_model_path = os.path.join(
                    self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
                )
                self._link_checkpoint(trainer, self._last_checkpoint_saved, self.last_model_path)
            self._remove_outdated(trainer, outdated, self._last_checkpoint_saved)

    def _remove_outdated(self, trainer: Trainer, outdated: str, current: str) -> None:
        if outdated and self._should_remove_checkpoint(trainer, outdated, current):
            try:
                self._remove_checkpoint(trainer, outdated)
            except OSError as error:
                rank_zero_warn(f"The outdated checkpoint {outdated} could not be removed: {error}.")

    # ------------------------------------------------------------------ how it is written

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        write_together(trainer.strategy, checkpoint, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        def link() -> None:
            partial = partial_path(Path(linkpath))
            remove(partial)
            partial.symlink_to(os.path.relpath(filepath, partial.parent))
            publish(partial, Path(linkpath))

        together(link if trainer.is_global_zero else None, linkpath)

    @contextmanager
    def _as_before_on_failure(self, trainer: Trainer) -> Iterator[None]:
        """Warn of a checkpoint that cannot be written, and go on as if it had not been tried."""
        before = {name: copy.copy(getattr(self, name)) for name in _CHANGED}
        try:
            yield
        except NotSaved as error:
            vars(self).update(before)
            self.failures += 1
            self._failed_at = trainer.global_step
            kept = f"; {self._last_checkpoint_saved} is kept" if self._last_checkpoint_saved else ""
            rank_zero_warn(
                f"NO CHECKPOINT at update {trainer.global_step}: {error}. The run goes on without it{kept}; make "
                f"room in {self.dirpath}, or what is learned from here on is lost when the run ends."
            )

    # ------------------------------------------------------------------ what it remembers, and finds again

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's, and what else is kept."""
        ours = {name: getattr(self, name) for name in ("previous_model_path", "newest_model_path", "failures")}
        return super().state_dict() | ours

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same files, unless the folder is another one."""
        super().load_state_dict(state_dict)
        self.failures = state_dict["failures"]
        if state_dict["dirpath"] == self.dirpath:
            self.previous_model_path = state_dict["previous_model_path"]
            self.newest_model_path = state_dict["newest_model_path"]

    def _folder(self, trainer: Trainer) -> str:
        # not that of the logger's version, which is a new one at every start
        return str(self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints"))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The newest whole checkpoint, by which Lightning finds what `ckpt_path: last` is."""
        folder = self._folder(trainer)
        if not _is_local_file_protocol(folder):
            return super()._find_last_checkpoints(trainer)
        found, torn = newest_whole(Path(folder))
        for path, lack in torn.items():
            instead = f"{found} is older and whole" if found else "there is no other"
            rank_zero_warn(f"The checkpoint {path} is torn and passed over ({lack}); {instead}.")
        return {str(found)} if found else set()
