"""SIGTERM, by which clusters announce that they take a machine away: save, and exit with status 143."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

STATUS = 128 + signal.SIGTERM  # by which a shell tells that SIGTERM ended a process


class _Interrupted(SystemExit):
    """Ends what may be ended at any point; no `except Exception` on the way takes it for a failure."""


class Preemption:
    """Takes SIGTERM in place of Lightning's own handler, which makes a collective in the middle of others.

    A signal is only noted. One rank alone gives up the sampling and the scoring that it is in at once, since they
    have changed nothing that a checkpoint holds. Several ranks, which the signal may reach at different moments,
    agree on it wherever all of them pass: behind each stage, and behind the updates of an iteration.
    """

    def __init__(self, trainer: Trainer, save: Callable[[], None]) -> None:
        self._trainer = trainer
        self._save = save
        self._requested = False
        self._may_interrupt = False
        # before Lightning registers it, together with SLURM's handlers and those that were there before
        trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[assignment, method-assign]

    def close(self) -> None:
        """Leave SIGTERM to Lightning again."""
        vars(self._trainer._signal_connector).pop("_sigterm_notifier_fn", None)

    def _note(self, signum: int, frame: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._requested:
            launcher.kill(signum)  # the ranks that it has started
        self._requested = True
        if self._may_interrupt:
            self._may_interrupt = False
            raise _Interrupted

    def guard(self, work: Callable[[], None]) -> None:
        """Do what changes nothing that a checkpoint holds, unless the run is asked to end; all ranks call it.

        Raises:
            SIGTERMException: When it was, and a checkpoint is saved.
        """
        try:
            try:
                self._may_interrupt = self._trainer.world_size == 1
                if not self._requested:
                    work()
            finally:
                self._may_interrupt = False
        except _Interrupted:
            pass
        self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """Save and end the run, if any rank is asked to; all ranks call it.

        Raises:
            SIGTERMException: With status 143, when it was and a checkpoint is saved.
        """
        trainer = self._trainer
        if not trainer.strategy.reduce_boolean_decision(self._requested, all=False):
            return
        rank_zero_info("SIGTERM: the run saves a checkpoint and ends")
        self._save()
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        # ranks that the first one has started are watched by it, and would take it down with any other status
        started = isinstance(environment, LightningEnvironment) and trainer.local_rank != 0
        raise SIGTERMException(0 if started else STATUS)
