"""Runs in processes of their own, which are killed for real, and what they have logged."""

import dataclasses
import multiprocessing.util
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_chain_sppo, make_trainer

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import (
    Checkpoint,
    ExactMatch,
    HackingMonitor,
    InitialValidation,
    ReferenceRefresh,
    RolloutGeneration,
    SuccessReplay,
    Verifier,
)
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling

HARDWARE = ("time/", "memory/", "rollout/seconds", "rollout/tokens_per_second")  # what no two runs agree on


def start(run: Callable[[], Any]) -> int:
    """Run in a fork of this process, which has imported everything; its id."""
    child = os.fork()
    if child:
        return child
    # as multiprocessing's own forks do: the thread that hands open files to other processes is not in this one
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)  # which pytest keeps for itself
    warnings.simplefilter("always")
    status: Any = 1
    try:
        run()
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if isinstance(status, int) else 1)


def wait(child: int) -> int:
    """How a process ended: its status, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(run: Callable[[], Any]) -> int:
    """The same of a run from start to end."""
    return wait(start(run))


class Signals(Callback):
    """Sends this process a signal in a hook of an iteration, counted from 1; of one rank only, where given."""

    def __init__(self, number: signal.Signals, iteration: int, hook: str, rank: int = 0) -> None:
        self.number, self.iteration, self.hook, self.rank = number, iteration, hook, rank
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.iteration and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class SignalsLast(Signals, lightning.pytorch.callbacks.Checkpoint):
    """Comes even behind the callbacks that save."""


def scalars(folder: Path) -> dict[tuple[str, int], set[float]]:
    """All values of each metric at each step, over all starts of a run, without those that the hardware decides."""
    found: dict[tuple[str, int], set[float]] = {}
    for version in folder.glob("lightning_logs/version_*"):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            if not name.startswith(HARDWARE) and not name.endswith("/seconds"):
                for event in events.Scalars(name):
                    found.setdefault((name, event.step), set()).add(event.value)
    return found


def different(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that are not the same to the last bit."""
    assert expected.keys() == found.keys()
    return [name for name, weight in expected.items() if not torch.equal(weight, found[name])]


class Moody(Verifier):
    """Scores that all three generators of random numbers decide; one call is asked to end, and does not by itself."""

    def __init__(self, stalls_at: int | None) -> None:
        super().__init__()
        self.calls, self.stalls_at = 0, stalls_at

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        self.calls += 1
        if self.calls == self.stalls_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return [float(np.random.rand() + random.random() + float(torch.rand(())) > 1.5) for _ in prompts]


@dataclasses.dataclass
class Run:
    """20 iterations of two updates, three to an epoch, in a folder; validated after every 5th."""

    folder: Path
    every: int = 20  # updates between checkpoints
    prefetch: int = 0
    devices: int = 1
    stalls_at: int | None = None
    epochs: int | None = None  # instead of 40 updates

    def __call__(self, *signals: Callback) -> None:
        """From `last`, if there is one; the weights go to a file at the end."""
        seed_everything(5, verbose=False)
        module = make_chain_sppo(1e-2, kl_coef=0.05)
        data = PromptDataModule(
            train=ChainTask({"1-3": 1.0}, size=24),
            validation={"few": ChainTask({"1-3": 1.0}, size=8, split="validation")},
            batch_size=8,
        )
        trainer = make_trainer(
            InitialValidation(),
            RolloutGeneration(Sampling(max_new_tokens=8), prefetch=self.prefetch),
            Moody(self.stalls_at),
            SuccessReplay(below=1.0, rows=4),
            HackingMonitor(checks=[ExactMatch(extract="whole", name="strict")], check_every_n_iterations=2),
            ReferenceRefresh(every_n_updates=3, mix=0.5),
            Checkpoint(every_n_train_steps=self.every),
            *signals,
            default_root_dir=str(self.folder),
            logger=TensorBoardLogger(self.folder),
            enable_checkpointing=True,
            val_check_interval=5,
            check_val_every_n_epoch=None,
            log_every_n_steps=1,
            max_steps=-1 if self.epochs else 40,
            max_epochs=self.epochs or -1,
            devices=self.devices,
            strategy="ddp_fork" if self.devices > 1 else "auto",
        )
        trainer.fit(module, data, ckpt_path="last")
        torch.save(module.state_dict(), self.folder / "weights.pt")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "weights.pt")

    @property
    def checkpoints(self) -> set[str]:
        return {path.name for path in self.folder.glob("checkpoints/*")}


def assert_undisturbed(run: Run, whole: Run) -> None:
    """The same weights, and the same metrics at the same steps, whichever start logged them."""
    assert different(whole.weights, run.weights) == []
    expected, found = scalars(whole.folder), scalars(run.folder)
    assert {key: values for key, values in expected.items() if found.get(key) != values} == {}
    assert found.keys() == expected.keys()
