"""What the benchmark of exploration came to: a table, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from exploration_arms import BANDS, HARDEST
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from sppo_lightning.figures.race import STYLES
from sppo_lightning.figures.style import percent, tidy

GOAL = 0.5  # accuracy on the hardest band
AXES = {"tokens": "generated tokens", "seconds": "training time (s), validation left out"}
_MEANS = ("tokens", "of uniform's", "seconds", "of uniform's")
_CAPTION = (
    "Means leave out the seeds with which no arm got there. >: a run that did not counts with all that it had."
)
Rows = Sequence[Mapping[str, Any]]  # a run's validations, as `timed.TokenClock` writes them
Arm = Mapping[str, Any]  # what `figures_of` gives


def reached(rows: Rows, x: str, band: str = HARDEST, goal: float = GOAL) -> float | None:
    """Where on the axis `x` accuracy is first at the goal, by straight lines between validations; None if never."""
    before = rows[0]
    for row in rows:
        high, low = row["accuracy"][band], before["accuracy"][band]
        if high >= goal:
            share = 1.0 if high == low else (goal - low) / (high - low)
            return float(before[x] + max(share, 0.0) * (row[x] - before[x]))
        before = row
    return None


def figures_of(runs: Sequence[Rows]) -> dict[str, Any]:
    """One arm's figures over its seeds."""
    last = [run[-1] for run in runs]
    return {
        "runs": runs,
        "before": {band: mean(run[0]["accuracy"][band] for run in runs) for band in BANDS},
        "after": {band: mean(row["accuracy"][band] for row in last) for band in BANDS},
        "tokens_to_goal": [reached(run, "tokens") for run in runs],
        "seconds_to_goal": [reached(run, "seconds") for run in runs],
        "tokens": [row["tokens"] for row in last],
        "seconds": [row["seconds"] for row in last],
    }


def least(arm: Arm, x: str) -> list[float]:
    """Per seed, what the goal took, or all that the run had where it did not get there: then a lower bound."""
    return [total if took is None else took for took, total in zip(arm[f"{x}_to_goal"], arm[x], strict=True)]


def telling(arms: Mapping[str, Arm]) -> list[int]:
    """Places of the seeds with which at least one arm got to the goal; the others say nothing of what is better."""
    seeds = zip(*(arm["tokens_to_goal"] for arm in arms.values()), strict=True)
    return [place for place, took in enumerate(seeds) if any(tokens is not None for tokens in took)]


def mean_to_goal(arm: Arm, x: str, seeds: Sequence[int]) -> float:
    """Mean of `least` over these seeds."""
    took = least(arm, x)
    return mean(took[seed] for seed in seeds)


def write(by_arm: Mapping[str, Sequence[Path]], folder: Path, figures: Path) -> None:
    """The table on the terminal, `exploration.json` in `folder`, and two figures in `figures`."""
    arms = {
        name: figures_of([json.loads((run / "progress.json").read_text()) for run in runs])
        for name, runs in by_arm.items()
    }
    show(arms)
    (folder / "exploration.json").write_text(json.dumps({"goal": GOAL, "bands": BANDS, "arms": arms}, indent=1))
    figures.mkdir(parents=True, exist_ok=True)
    curves(arms).savefig(figures / "exploration.png", dpi=110)
    to_goal(arms).savefig(figures / "exploration_goal.png", dpi=110)
    print(f"Written: {folder / 'exploration.json'}, and exploration.png and exploration_goal.png in {figures}")


def show(arms: Mapping[str, Arm]) -> None:
    """One line per arm, tokens by seed, `–` where the goal was not reached.

    Means are over the `telling` seeds; `>` marks one in which a run that did not get there counts with all that it
    had.
    """
    table = Table(title=f"{GOAL:.0%} of the hardest band ({BANDS[HARDEST]} operations)", caption=_CAPTION)
    for column in ("arm", "tokens by seed, in thousands", *_MEANS, *BANDS):
        table.add_column(column, justify="right")
    seeds = telling(arms)
    compared = AXES if seeds else ()
    uniform = {x: mean_to_goal(arms["uniform"], x, seeds) for x in compared if "uniform" in arms}
    for name, arm in arms.items():
        cells = []
        for x in compared:
            sign = ">" if any(arm[f"{x}_to_goal"][seed] is None for seed in seeds) else ""
            took = mean_to_goal(arm, x, seeds)
            cells += [f"{sign}{took:,.0f}", f"{took / uniform[x]:.2f}" if uniform.get(x) else "–"]
        by_seed = ["–" if tokens is None else f"{tokens / 1000:,.0f}" for tokens in arm["tokens_to_goal"]]
        ends = [f"{arm['before'][band]:.2f} → {arm['after'][band]:.2f}" for band in BANDS]
        table.add_row(name, "  ".join(by_seed), *(cells or ["–"] * len(_MEANS)), *ends)
    Console(width=160).print(table)


def curves(arms: Mapping[str, Arm]) -> Figure:
    """Accuracy of each band over tokens and over time: mean over seeds; a run that has ended keeps what it had."""
    figure = Figure(figsize=(13.0, 7.4), layout="constrained")
    grid = figure.subplots(2, len(BANDS), sharey=True)
    for row, (x, label) in zip(grid, AXES.items(), strict=True):
        for axes, (band, operations) in zip(row, BANDS.items(), strict=True):
            for (name, arm), (colour, dashes) in zip(arms.items(), STYLES, strict=False):
                _mean_line(axes, arm["runs"], x, band, label=name, color=colour, linestyle=dashes)
            axes.set_title(f"{operations} operations", fontsize=11)
            axes.set_xlabel(label)
            axes.yaxis.set_major_formatter(percent())
            axes.set_ylim(0, 1)
            if x == "tokens":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            tidy(axes)
        row[-1].axhline(GOAL, color="#999999", linewidth=0.8)
        row[0].set_ylabel("sampled responses that are right")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _mean_line(axes: Axes, runs: Sequence[Rows], x: str, band: str, **style: Any) -> None:
    places = np.linspace(0.0, max(run[-1][x] for run in runs), 200)
    lines = [np.interp(places, [r[x] for r in run], [r["accuracy"][band] for r in run]) for run in runs]
    axes.plot(places, np.mean(lines, axis=0), linewidth=1.8, **style)


def to_goal(arms: Mapping[str, Arm]) -> Figure:
    """Tokens and time to the goal: a bar for the mean of `show`, a dot for each seed, an arrow's head if never."""
    seeds = telling(arms)
    figure = Figure(figsize=(11.5, 0.42 * len(arms) + 1.3), layout="constrained")
    for axes, (x, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for place, (arm, (colour, _)) in enumerate(zip(arms.values(), STYLES, strict=False)):
            if seeds:
                axes.barh(place, mean_to_goal(arm, x, seeds), color=colour, alpha=0.35, height=0.62)
            for here, there in zip(least(arm, x), arm[f"{x}_to_goal"], strict=True):
                marker = ">" if there is None else "o"
                axes.plot(here, place, marker=marker, color=colour, markersize=6, clip_on=False)
        axes.set_yticks(range(len(arms)), [*arms])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(label)
        tidy(axes)
    axes.invert_yaxis()
    figure.suptitle(f"To {GOAL:.0%} on {BANDS[HARDEST]} operations (▸: not reached)", fontsize=11)
    return figure
