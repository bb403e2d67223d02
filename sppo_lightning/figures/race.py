"""Who learns fastest: methods against each other over time or samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from sppo_lightning.errors import InputError
from sppo_lightning.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    tidy,
    time_unit,
)

_WINE, _VIOLET, _BROWN = "#882255", "#4B0092", "#543005"  # as far from the others as those are from each other
STYLES: tuple[tuple[str, Any], ...] = (  # colour and dashes of each method, in this order
    (BLUE, "-"),
    (RED, (0, (6, 1.5))),
    (GREEN, (0, (1.2, 1.2))),
    (PURPLE, (0, (6, 1.5, 1.2, 1.5))),
    (ORANGE, (0, (3, 1.5))),
    (BLACK, (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5))),
    (SKY, (0, (9, 2))),
    (_WINE, (0, (3, 1.5, 1.2, 1.5))),
    (_VIOLET, (0, (2, 3))),
    (_BROWN, (0, (9, 2, 3, 2))),
)
_GRID = 200  # points of a mean line


@dataclass(frozen=True)
class Curve:
    """One run's accuracy as training goes on, measured `n` times."""

    seconds: Sequence[float]  # [n], of training, validation left out; rising
    samples: Sequence[float]  # [n], responses sampled for training so far; rising
    accuracy: Sequence[float]  # [n], share of the held-out responses solved


def race_figure(
    curves: Mapping[str, Sequence[Curve]],
    x: Literal["seconds", "samples"],
    *,
    title: str = "Accuracy on held-out prompts",
    accuracy: str = "share of sampled responses solved",
) -> Figure:
    """Accuracy of several methods over training time or samples: mean over seeds, ± one standard deviation.

    The runs of a method are interpolated on a common grid, which ends where the first of them ends. The legend
    has the mean of the runs' last accuracies, the best method first; ± is the standard deviation over seeds.

    Args:
        curves: The runs of each method by its name, one per seed; at most 10 methods.
        x: What the horizontal axis counts.
        title: Stands above the figure.
        accuracy: Label of the vertical axis.

    Raises:
        InputError: For an unknown `x`, more than 10 methods, or runs that cannot be averaged.
    """
    if x not in ("seconds", "samples"):
        raise InputError(f'`x`={x!r} is no axis of a race; use "seconds" or "samples".')
    if len(curves) > len(STYLES):
        raise InputError(
            f"`curves` has {len(curves)} methods, more than {len(STYLES)} styles tell apart; leave some out."
        )
    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    axes = figure.subplots()
    last = max((max(getattr(run, x), default=0.0) for runs in curves.values() for run in runs), default=1.0)
    divisor, unit = time_unit(last) if x == "seconds" else (1.0, "")
    finals: dict[str, float] = {}
    for (name, runs), (colour, dashes) in zip(curves.items(), STYLES, strict=False):
        grid, rates = _on_a_grid(name, runs, x)
        ends = np.array([run.accuracy[-1] for run in runs])
        finals[name] = float(ends.mean())
        label = f"{name}  {ends.mean():.3f}" + (f" ± {ends.std(ddof=1):.3f}" if len(runs) > 1 else "")
        _draw(axes, grid / divisor, rates, label, color=colour, linestyle=dashes)
    axes.set_title(title, fontsize=13, fontweight="bold", pad=12)
    axes.set_ylabel(accuracy)
    axes.set_xlabel(f"training time ({unit}), validation left out" if x == "seconds" else "sampled responses")
    if x == "samples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tidy(axes)
    _legend(figure, axes, finals)
    return figure


def _on_a_grid(name: str, runs: Sequence[Curve], x: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places `[points]` that all runs reach, and their accuracies `[runs, points]` there."""
    lines = [(np.asarray(getattr(run, x), np.float64), np.asarray(run.accuracy, np.float64)) for run in runs]
    for places, rates in lines:
        if len(places) != len(rates) or not len(places) or (np.diff(places) < 0).any():
            raise InputError(
                f"A run of {name!r} has {len(places)} {x} and {len(rates)} accuracies; give as many of both, at "
                f"least one, with the {x} rising."
            )
    start, end = max((p[0] for p, _ in lines), default=0.0), min((p[-1] for p, _ in lines), default=-1.0)
    if start > end:
        raise InputError(
            f"The runs of {name!r} have no {x} in common, so they have no mean; give each its own name."
        )
    grid = np.linspace(start, end, _GRID)
    return grid, np.stack([np.interp(grid, places, rates) for places, rates in lines])


def _draw(axes: Axes, places: NDArray, rates: NDArray, label: str, **style: Any) -> None:
    """The mean over the runs with a dot at its end, and a band of one standard deviation around it."""
    mean = rates.mean(axis=0)
    axes.plot(places, mean, linewidth=2.2, label=label, zorder=3, **style)
    axes.plot(places[-1:], mean[-1:], "o", markersize=6, color=style["color"], zorder=4)
    if len(rates) > 1:
        spread = rates.std(axis=0, ddof=1)
        axes.fill_between(places, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def _legend(figure: Figure, axes: Axes, finals: Mapping[str, float]) -> None:
    """The methods at the right, the one that ends best first."""
    handles, labels = axes.get_legend_handles_labels()
    order = np.argsort([-final for final in finals.values()], kind="stable")
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        title="final accuracy",
        loc="outside right upper",
        fontsize=9,
        frameon=False,
        handlelength=4.0,
        alignment="left",
    )
