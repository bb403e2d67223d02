"""What the benchmarks share: runs in turns, medians and their spread, the machine, and the report."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

from sppo_lightning.figures.style import tidy


@dataclass(frozen=True)
class Spread:
    """The median of several runs, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.least:,.0f} to {self.greatest:,.0f})"


def in_turns(tasks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """What each task does per second, over `rounds` rounds in which every task has its turn.

    A task returns how much it did. A round before them warms up.
    """
    speeds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            done = task()
            if number:
                speeds[name].append(done / (time.perf_counter() - start))
    return {name: Spread.of(values) for name, values in speeds.items()}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "gpu": card,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_figure(figure: Figure, path: Path) -> None:
    """The figure, all its axes in the project's style."""
    for axes in figure.axes:
        tidy(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The report and the machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **report}, indent=2) + "\n")
    print(f"written to {path}")
