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

    Shows the iteration, time elapsed and left (by `max_steps`, `max_epochs` or `max_time`, whichever comes
    first), reward, the critic's mean V, sampled tokens per second, loss and the last validation's accuracy.

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
        self.theme.metrics_text_delimiter = "  "
        self.theme.metrics = ""
        self._prints = False  # plain lines, on this rank
        self._start: float | None = None
        self._first = (0, 0)  # iterations and updates done when this process began to train
        self._pace_start = 0.0
        self._validation_start = 0.0
        self._accuracy: float | None = None

    # ------------------------------------------------------------------ what is shown

    @property
    def iteration(self) -> int:
        """Iterations done, those before a resume included."""
        return self.trainer.fit_loop.total_batch_idx + 1

    @property
    def total_train_batches(self) -> float:
        """Iterations of the whole run, as far as it is known."""
        return self.forecast().iterations

    @property
    def validation_description(self) -> str:
        """The name of the validation's bar, as long as the training's."""
        return "validate"

    def forecast(self) -> Forecast:
        """The end of this run, by the limits of its trainer."""
        trainer, done = self.trainer, self.iteration - self._first[0]
        limit = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limit = trainer.max_epochs * trainer.num_training_batches
        updates = trainer.global_step - self._first[1]
        if trainer.max_steps >= 0 and updates > 0:
            per_iteration = updates / done
            limit = min(
                limit, self.iteration + math.ceil((trainer.max_steps - trainer.global_step) / per_iteration)
            )
        timers = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        return forecast(
            self.iteration,
            seconds_per_iteration=(time.perf_counter() - self._pace_start) / done if done > 0 else None,
            limit=limit,
            seconds_left=min((left for left in timers if left is not None), default=None),
        )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The few numbers that fit beside the bar, the most telling first."""
        metrics = compact(trainer.callback_metrics)
        return metrics if self._accuracy is None else {**metrics, "val": f"{self._accuracy:.2f}"}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Name, bar, iterations and time; Lightning adds the metrics."""
        theme = self.theme
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(
                bar_width=14,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            _CountColumn(self),
            _TimeColumn(self),
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
        self._first = (self.iteration, trainer.global_step)

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
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.fit_loop.total_batch_idx)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, total=self.total_train_batches)
        due = self.iteration % self.plain_every_n_iterations == 0 or self.iteration == self._first[0] + 1
        if self._prints and due:
            end = self.forecast()
            numbers = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"iteration {self.iteration}/{end}  {self._times(end)}  {numbers}", flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the validation began."""
        super().on_validation_start(trainer, pl_module)
        self._validation_start = time.perf_counter()
        self._start = self._start or self._validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracy on each validation set."""
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking:
            self._accuracy = by_dataset(metrics, r"avg@\d+").get("all")
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        when = f" at iteration {self.iteration}" if trainer.state.fn == TrainerFn.FITTING else ""
        seconds = time.perf_counter() - self._validation_start
        line = f"validation{when} ({seconds:.1f} s)  {validation_line(metrics)}"
        if self._prints:
            print(line, flush=True)
        elif self.progress is not None:
            self.progress.console.print(line, markup=False, highlight=False)

    def _times(self, end: Forecast) -> str:
        elapsed = clock(0.0 if self._start is None else time.perf_counter() - self._start)
        return elapsed if end.seconds_left is None else f"{elapsed}, {clock(end.seconds_left)} left"


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


_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {  # by metric: label and spelling
    "reward/mean": ("reward", "{:.2f}".format),
    "critic/value_mean": ("V", "{:.2f}".format),
    "rollout/tokens_per_second": ("tok/s", thousands),
    "policy/loss": ("loss", "{:.3f}".format),
    "sft/loss": ("loss", "{:.3f}".format),
}


def compact(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Reward, V, tokens per second and loss in a few characters each, out of all that is logged."""
    return {label: write(float(metrics[name])) for name, (label, write) in _SHOWN.items() if name in metrics}


def validation_line(metrics: Mapping[str, Any]) -> str:
    """Sampled accuracy per data set, greedy accuracy in brackets, and the critic's correlation."""
    sampled, greedy = by_dataset(metrics, r"avg@\d+"), by_dataset(metrics, "greedy")
    names = [name for name in dict.fromkeys([*sampled, *greedy]) if name != "all" or len(sampled) > 2]
    parts = []
    for name in names:
        rate = f"{sampled[name]:.3f}" if name in sampled else "–"
        parts.append(f"{name} {rate}" + (f" (greedy {greedy[name]:.3f})" if name in greedy else ""))
    if "all" in (foresight := by_dataset(metrics, "critic_pearson")):
        parts.append(f"V against pass rate: r {foresight['all']:.2f}")
    return "  ".join(parts) or "no response with a verdict"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, or `2:03` below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _CountColumn(ProgressColumn):
    """`12/200`; `12/~200` where the total is an estimate."""

    def __init__(self, bar: RichProgress) -> None:
        self.bar = bar
        super().__init__()

    def render(self, task: Task) -> Text:
        if task.id == self.bar.train_progress_bar_id:
            return Text(f"{int(task.completed)}/{self.bar.forecast()}")
        return Text(f"{int(task.completed)}/{task.total or 0:.0f}")


class _TimeColumn(ProgressColumn):
    """`1:12, 12:30 left` for the run, the time elapsed for everything else."""

    max_refresh = 0.5

    def __init__(self, bar: RichProgress) -> None:
        self.bar = bar
        super().__init__()

    def render(self, task: Task) -> Text:
        if task.id == self.bar.train_progress_bar_id:
            return Text(self.bar._times(self.bar.forecast()), style="dim")
        return Text(clock(task.elapsed or 0.0), style="dim")
