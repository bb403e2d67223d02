"""How far the run is and how well it goes, in a terminal or in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import by_dataset


@dataclass(frozen=True)
class Forecast:
    """How long a run goes on, by whichever of its limits comes first.

    Attributes:
        iterations: Iterations of the whole run; infinite where nothing limits it, or nothing is known yet.
        seconds_left: Seconds from now to the end; None where unknown.
        by_time: Whether `trainer.max_time` ends the run, so that `iterations` is an estimate.
    """

    iterations: float = math.inf
    seconds_left: float | None = None
    by_time: bool = False

    def __str__(self) -> str:
        return f"{'~' * self.by_time}{self.iterations:.0f}" if math.isfinite(self.iterations) else "–"


def forecast(
    iteration: int,
    *,
    seconds_per_iteration: float | None,
    limit: float,
    seconds_left: float | None,
) -> Forecast:
    """The end of a run of which `iteration` iterations are done.

    Args:
        iteration: Iterations done.
        seconds_per_iteration: Their mean duration, validation included; None before the first one.
        limit: Iterations after which `max_epochs` or `max_steps` ends the run; infinite without either.
        seconds_left: Seconds until `max_time` ends it; None without that limit.
    """
    if seconds_per_iteration is None:
        return Forecast(limit, seconds_left)
    left = (limit - iteration) * seconds_per_iteration
    if seconds_left is not None and seconds_left < left:
        seconds_left = max(seconds_left, 0.0)
        return Forecast(iteration + math.ceil(seconds_left / seconds_per_iteration), seconds_left, True)
    return Forecast(limit, left if math.isfinite(left) else None)


class RichProgress(RichProgressBar):
    """One bar over the whole run in a terminal, plain lines elsewhere, and a line after each validation.

    Shows the iteration, time elapsed < left (by `max_steps`, `max_epochs` or `max_time`, whichever comes first),
    reward, the critic's mean V, the last validation's accuracy, sampled tokens per second and the loss.

    Args:
        plain_every_n_iterations: Iterations from one plain line to the next.
        plain: Print plain lines instead of a bar; left out: decided by whether the output is a terminal.
        refresh_rate: Refreshes of the bar per second at most; 0 shows no bar.
    """

    def __init__(
        self, plain_every_n_iterations: int = 10, plain: bool | None = None, refresh_rate: int = 4
    ) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if plain_every_n_iterations < 1:
            raise InputError(
                f"`RichProgress.plain_every_n_iterations`={plain_every_n_iterations} prints nothing; use 1 or more."
            )
        self.plain_every_n_iterations = plain_every_n_iterations
        self.plain = plain
        self._prints = False  # plain lines, on this rank
        self._start: float | None = None
        self._first = (0, 0)  # iterations and updates done when this process began to train
        self._pace_start = 0.0
        self._accuracy: float | None = None
        # what the bar's thread reads, which may not ask the trainer
        self._done, self._end, self._numbers = 0, Forecast(), ""

    # ------------------------------------------------------------------ what is shown

    @property
    def total_train_batches(self) -> float:
        """Iterations of the whole run, as far as it is known."""
        return self._end.iterations

    @property
    def validation_description(self) -> str:
        """The name of the validation's bar, as long as the training's."""
        return "validate"

    def forecast(self) -> Forecast:
        """The end of this run, by the limits of its trainer."""
        trainer, done = self.trainer, self._done - self._first[0]
        limit = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limit = trainer.max_epochs * trainer.num_training_batches
        updates = trainer.global_step - self._first[1]
        if trainer.max_steps >= 0 and updates > 0:
            per_iteration = updates / done
            left = math.ceil((trainer.max_steps - trainer.global_step) / per_iteration)
            limit = min(limit, self._done + left)
        timers = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        return forecast(
            self._done,
            seconds_per_iteration=(time.perf_counter() - self._pace_start) / done if done > 0 else None,
            limit=limit,
            seconds_left=min((left for left in timers if left is not None), default=None),
        )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Nothing, for Lightning's own column, which takes more room than there is."""
        return {}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Name, bar, iterations, time and numbers: 100 characters together."""
        theme = self.theme
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(
                bar_width=10,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            _RunColumn(self, self._count, lambda task: f"{task.completed:.0f}/{task.total:.0f}"),
            _RunColumn(self, self._times, lambda task: clock(task.elapsed or 0.0)),
            _RunColumn(self, lambda: self._numbers),
        ]

    # ------------------------------------------------------------------ when it is shown

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between the bar and plain lines."""
        super().setup(trainer, pl_module, stage)
        plain = not _is_live() if self.plain is None else self.plain
        self._prints = plain and trainer.is_global_zero
        if plain:
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._start = self._start or time.perf_counter()
        self._done = trainer.fit_loop.total_batch_idx + 1  # more than 0 after a resume
        self._first = (self._done, trainer.global_step)
        self._end = self.forecast()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the bar of the run with its first epoch."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the pace from the first batch on, so that what came before does not count."""
        if self._pace_start == 0.0:
            self._pace_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line every so often."""
        self._done = trainer.fit_loop.total_batch_idx + 1
        self._end = self.forecast()
        self._numbers = numbers(trainer.callback_metrics, self._accuracy)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, self._done - 1)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, total=self._end.iterations)
        due = self._done % self.plain_every_n_iterations == 0
        if self._prints and (due or self._done in (self._first[0] + 1, self._end.iterations)):
            print("  ".join([f"iteration {self._count()}", self._times(), self._numbers]), flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, should a callback validate before `on_train_start` gets here."""
        super().on_validation_start(trainer, pl_module)
        self._start = self._start or time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracy on each validation set."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking:
            self._accuracy = by_dataset(metrics, r"avg@\d+").get("all")
            self._numbers = numbers(metrics, self._accuracy)
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        when = f" at iteration {self._done}" if trainer.state.fn == TrainerFn.FITTING else ""
        line = f"validation{when}, {validation_line(metrics)}"
        if self._prints:
            print(line, flush=True)
        elif self.progress is not None:
            self.progress.console.print(line, markup=False, highlight=False)

    def _count(self) -> str:
        return f"{self._done}/{self._end}"

    def _times(self) -> str:
        elapsed = clock(0.0 if self._start is None else time.perf_counter() - self._start)
        return elapsed if self._end.seconds_left is None else f"{elapsed}<{clock(self._end.seconds_left)}"

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'train':{len(self.validation_description)}}"


def _is_live() -> bool:
    """Whether a bar can be redrawn where the output goes.

    Asks the output itself: rich also takes a CI's log for a terminal where FORCE_COLOR is set.
    """
    console = get_console()
    return console.is_jupyter or (sys.stdout.isatty() and not console.is_dumb_terminal)


def thousands(number: float) -> str:
    """Three digits or so: `834`, `12.3k`, `1.2M`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


_SHOWN: dict[str, Callable[[float], str]] = {  # by metric, the most telling first
    "reward/mean": "reward {:.2f}".format,
    "critic/value_mean": "V {:.2f}".format,
    "val": "val {:.2f}".format,
    "rollout/tokens_per_second": lambda speed: f"{thousands(speed)} tok/s",
    "policy/loss": "loss {:.2f}".format,
    "sft/loss": "loss {:.2f}".format,
}


def numbers(metrics: Mapping[str, Any], accuracy: float | None = None) -> str:
    """Reward, V, accuracy, tokens per second and loss, as far as they are known, in under 55 characters."""
    known = {**metrics, **({} if accuracy is None else {"val": accuracy})}
    return "  ".join(write(float(known[name])) for name, write in _SHOWN.items() if name in known)


def validation_line(metrics: Mapping[str, Any]) -> str:
    """Sampled accuracy per data set, greedy accuracy in brackets, and the critic's correlation."""
    sampled, greedy = by_dataset(metrics, r"avg@\d+"), by_dataset(metrics, "greedy")
    names = list(dict.fromkeys([*sampled, *greedy]))
    if len(names) == 2:  # "all" and the only data set are the same
        names.remove("all")
    parts = []
    for name in names:
        rate = f"{sampled[name]:.2f}" if name in sampled else "–"
        parts.append(f"{name} {rate}" + (f" ({greedy[name]:.2f})" if name in greedy else ""))
    if foresight := by_dataset(metrics, "critic_pearson"):
        parts.append(f"V's r {foresight['all']:.2f}")
    return f"sampled{' (greedy)' if greedy else ''}: " + ("  ".join(parts) or "no response with a verdict")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, or `2:03` below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _RunColumn(ProgressColumn):
    """A piece of text about the run beside its bar, and something else, if anything, beside the others."""

    def __init__(
        self, bar: RichProgress, run: Callable[[], str], other: Callable[[Task], str] = lambda task: ""
    ) -> None:
        self.bar, self.run, self.other = bar, run, other
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(self.run() if task.id == self.bar.train_progress_bar_id else self.other(task))
