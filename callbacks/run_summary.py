"""What a run came to: accuracy before and after, where the time went, and the learning curve."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from sppo_lightning.batch import PromptBatch
from sppo_lightning.evaluation import by_dataset
from sppo_lightning.figures import learning_curve
from sppo_lightning.files import replace_file
from sppo_lightning.memory import peak_memory
from sppo_lightning.resuming import validate_in_fit

PHASES = ("rollout", "verify", "update", "validation")


class RunSummary(Callback):
    """Writes `summary.json` and `learning_curve.png` when `fit` ends, and prints the summary as a table.

    A resumed run's summary covers the whole run, and an interrupted one's what there is. `before` and `after`
    are the first and the last validation, so add `InitialValidation` to the callbacks for a `before` that
    deserves its name. Seconds in the curve count training alone, validation left out.

    Args:
        path: Folder of the two files; made where it is missing.
        title: Title of the figure and the table; the folder's name where none is given.
        final_validation: Validate once more when training ends, where the last iteration was not validated, so
            that `after` is the model that the run ends with.
    """

    def __init__(self, path: str = "runs/summary", title: str | None = None, final_validation: bool = True) -> None:
        self.path = Path(path)
        self.title = title or self.path.name
        self.final_validation = final_validation
        self.curve: list[dict[str, Any]] = []  # one row per iteration
        self.validations: list[dict[str, Any]] = []  # one row per validation
        self.updates = 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds_before = 0.0  # of the runs that this one resumes
        self._start: float | None = None
        self._validation_start = 0.0
        self._memory = 0.0  # peaks, in MB
        self._gpu_memory = 0.0

    # ------------------------------------------------------------------ listening

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start_clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the validation began."""
        if _counts(trainer):
            self._start_clock()  # the validation may come from another callback's `on_train_start`
            self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation's metrics, and its seconds."""
        if not _counts(trainer):
            return
        self._seconds["validation"] += time.perf_counter() - self._validation_start
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        iteration = len(self.curve)
        # a resumed run may repeat the validation at which it was saved
        self.validations = [row for row in self.validations if row["iteration"] != iteration]
        self.validations.append({"iteration": iteration, "seconds": self.training_seconds, "metrics": metrics})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Note the iteration's reward, or its loss in supervised learning, and the seconds of its phases."""
        seconds: dict[str, float] = pl_module.last_phase_seconds  # type: ignore[assignment]
        for phase, value in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + value
        self.updates = trainer.global_step
        row: dict[str, Any] = {"iteration": len(self.curve) + 1, "seconds": self.training_seconds}
        metrics = trainer.callback_metrics
        if "sft/loss" in metrics:
            row["loss"] = float(metrics["sft/loss"])
        else:
            rollouts = batch.rollouts
            row["reward"] = _number(metrics.get("reward/mean"))
            row["value"] = _number(metrics.get("critic/value_mean"))
            row["advantage_mean"] = _number(metrics.get("advantage/mean"))
            row["advantage_std"] = _number(metrics.get("advantage/std"))
            row["policy_grad_norm"] = _number(metrics.get("policy/grad_norm"))
            row["responses"] = _sampled(batch, metrics, trainer.world_size)
            lengths = None if rollouts is None else rollouts.response_mask.sum(1)
            row["response_tokens"] = None if lengths is None or not len(lengths) else float(lengths.mean())
        self.curve.append(row)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the model that the run ends with."""
        measured = self.validations and self.validations[-1]["iteration"] == len(self.curve)
        if self.final_validation and not measured:
            validate_in_fit(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files and print the table."""
        self._stop_clock()
        if trainer.is_global_zero and (self.curve or self.validations):
            self._write()
            for table in self.tables():
                rich.get_console().print(table)
            rank_zero_info(f"Wrote the summary and the learning curve to {self.path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the files with what there is, if an iteration was trained at all."""
        self._stop_clock()
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING and self.curve:
            self._write()
            rank_zero_info(f"The run ended early; wrote its summary so far to {self.path}")

    def state_dict(self) -> dict[str, Any]:
        """Everything noted so far."""
        self._note_memory()
        return {
            "curve": list(self.curve),
            "validations": list(self.validations),
            "updates": self.updates,
            "seconds": dict(self._seconds),
            "total_seconds": self.total_seconds,
            "memory": self._memory,
            "gpu_memory": self._gpu_memory,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.curve, self.validations = state_dict["curve"], state_dict["validations"]
        self.updates = state_dict["updates"]
        self._seconds = state_dict["seconds"]
        self._seconds_before = state_dict["total_seconds"]
        self._memory, self._gpu_memory = state_dict["memory"], state_dict["gpu_memory"]

    # ------------------------------------------------------------------ what it comes to

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the whole run, those before a resume included."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._seconds_before + running

    @property
    def training_seconds(self) -> float:
        """`total_seconds` without validation."""
        return self.total_seconds - self._seconds["validation"]

    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        self._note_memory()
        first, last = self._ends()
        metrics = self.validations[-1]["metrics"] if self.validations else {}
        gpu = {"peak_gpu_memory_mb": self._gpu_memory} if self._gpu_memory else {}
        return {
            "before": first and accuracies(first["metrics"]),
            "after": last and accuracies(last["metrics"]),
            "control": None,  # of another run: for a script that compares the two
            "seconds": {**self._seconds, "total": self.total_seconds},
            "peak_memory_mb": self._memory,
            **gpu,
            "critic_pearson": by_dataset(metrics, "critic_pearson").get("all"),
            "iterations": len(self.curve),
            "updates": self.updates,
            "curve": self.curve,
            "validations": self.validations,
        }

    def tables(self) -> list[Table]:
        """The summary for a terminal: accuracy per data set where there is one, and seconds per phase."""
        first, last = self._ends()
        accuracy = [_accuracy_table(self.title, first, last, len(self.curve))] if first or last else []
        return [*accuracy, _time_table(self._seconds, self.total_seconds)]

    def _ends(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The first and the last validation; a single one is what it can be, by its iteration."""
        if len(self.validations) > 1:
            return self.validations[0], self.validations[-1]
        only = self.validations[0] if self.validations else None
        return (only, None) if only and only["iteration"] == 0 else (None, only)

    def _start_clock(self) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def _stop_clock(self) -> None:
        self._seconds_before, self._start = self.total_seconds, None

    def _note_memory(self) -> None:
        peaks = peak_memory()
        self._memory = max(self._memory, peaks["peak_mb"])
        self._gpu_memory = max(self._gpu_memory, peaks.get("gpu_peak_mb", 0.0))

    def _write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(self.summary()), indent=2, allow_nan=False)
        replace_file(self.path / "summary.json", lambda path: path.write_text(text + "\n"))
        figure = learning_curve(self.curve, self.validations, title=self.title)
        replace_file(self.path / "learning_curve.png", lambda path: figure.savefig(path, dpi=150, format="png"))


def accuracies(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`{"sampled": {"all": …, "<dataset>": …}, "greedy": {…}}` of a validation's metrics."""
    return {"sampled": by_dataset(metrics, r"avg@\d+"), "greedy": by_dataset(metrics, "greedy")}


def _sampled(batch: PromptBatch, metrics: Mapping[str, Any], ranks: int) -> int:
    """Responses that all ranks have sampled for the iteration: greedy, extra and replaced ones too."""
    if batch.rollouts is None or not len(batch):
        return 0
    alike = len(batch.rollouts) - batch.extra_responses  # as many on every rank
    kept = alike + (0 if batch.greedy_rollouts is None else len(batch.greedy_rollouts))
    replaced = float(metrics.get("rollout/resampled_prompts", 0.0)) / len(batch)
    return round(kept * (1 + replaced)) * ranks + round(float(metrics.get("adaptive/extra_samples", 0.0)))


def _counts(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _accuracy_table(
    title: str, first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, iterations: int
) -> Table:
    """Before, after and change, sampled and greedy, one row per data set."""
    table = Table(title=title, caption=_when(first, last, iterations), title_style="bold")
    before, after = (accuracies(row["metrics"]) if row else None for row in (first, last))
    kinds = [k for k in ("sampled", "greedy") if any(side and side[k] for side in (before, after))]
    table.add_column("data set")
    for kind in kinds:
        for heading in (f"{kind} before", "after", "change"):
            table.add_column(heading, justify="right")
    names = list(dict.fromkeys(n for side in (before, after) if side for k in kinds for n in side[k]))
    if len(names) == 2:  # "all" and the only data set are the same
        names.remove("all")
    for name in names:
        cells = []
        for kind in kinds:
            old, new = (side[kind].get(name) if side else None for side in (before, after))
            change = "–" if old is None or new is None else f"{new - old:+.3f}"
            cells += [*("–" if rate is None else f"{rate:.3f}" for rate in (old, new)), change]
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    return table


def _when(first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, iterations: int) -> str | None:
    """Says so where "before" is not the start or "after" not the end."""
    parts = []
    if first and first["iteration"] > 0:
        parts.append(f"before: iteration {first['iteration']}")
    if last and last["iteration"] < iterations:
        parts.append(f"after: iteration {last['iteration']}")
    return f"{', '.join(parts)} of {iterations}" if parts else None


def _time_table(seconds: Mapping[str, float], total: float) -> Table:
    table = Table(title="time per phase", title_style="bold")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for phase, value in {**seconds, "other": total - sum(seconds.values())}.items():
        table.add_row(phase, f"{value:.1f}", f"{value / max(total, 1e-9):.1%}")
    table.add_row("total", f"{total:.1f}", "", style="bold")
    return table


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def plain(value: Any) -> Any:
    """`value` with six decimals, and null for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
