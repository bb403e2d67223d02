"""What a run learned over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from sppo_lightning.evaluation import by_dataset
from sppo_lightning.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    legend_below,
    tidy,
    time_unit,
)

_DATASETS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
_MARKERS = ("o", "s", "^", "D", "v", "P")  # shape as well as colour tells the data sets apart


def learning_curve(
    curve: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    *,
    control: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Learning curve",
) -> Figure:
    """Sampled accuracy per data set, and the training reward with the critic's mean V, over training time.

    Args:
        curve: One row per iteration: `seconds`, and `reward` and `value` or, in supervised learning, `loss`.
        validations: One row per validation: `seconds`, and `metrics` by name as they are logged.
        control: The validations of another run, drawn dashed.
        title: Stands above the figure.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    held_out, training = figure.subplots(1, 2)
    last = max((row["seconds"] for row in [*curve, *validations, *(control or ())]), default=1.0)
    divisor, unit = time_unit(last)
    _draw_accuracy(held_out, validations, control or (), divisor)
    _draw_training(training, curve, divisor)
    for axes in (held_out, training):
        axes.set(
            xlabel=f"training time ({unit}), validation left out",
            xlim=np.array((-0.03, 1.03)) * last / divisor,
        )
        tidy(axes)
    return figure


def _draw_accuracy(
    axes: Axes, validations: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]], divisor: float
) -> None:
    """One line per data set, its first point hollow and its last one large; before → after in the legend."""
    names = list(dict.fromkeys(name for row in validations for name in _sampled(row)))
    if len(names) == 2:  # "all" and the only data set are the same line
        names.remove("all")
    colours = iter(zip(_DATASETS * 4, _MARKERS * 4, strict=True))
    for name in names:
        colour, marker = (BLACK, "o") if name == "all" else next(colours)
        style: dict[str, Any] = {"color": colour, "zorder": 4 if name == "all" else 3}
        width = 2.4 if name == "all" else 1.6
        times, rates = _series(validations, name, divisor)
        control_times, control_rates = _series(control, name, divisor)
        label = f"{name}  {rates[0]:.2f} → {rates[-1]:.2f}"
        label += f"  (control {control_rates[-1]:.2f})" if control_rates else ""
        axes.plot(control_times, control_rates, linestyle=(0, (4, 2)), linewidth=width * 0.8, **style)
        axes.plot(times, rates, marker=marker, markersize=3.5, linewidth=width, label=label, **style)
        axes.plot(times[:1], rates[:1], marker, markersize=7.5, markerfacecolor="white", **style)
        axes.plot(times[-1:], rates[-1:], marker, markersize=7.5, **style)
    if control:
        axes.plot([], [], color=GREY, linestyle=(0, (4, 2)), label="control")
    axes.set(title="Accuracy on held-out prompts", ylabel="share of sampled responses solved", ylim=(0, 1.02))
    legend_below(axes)


def _sampled(validation: Mapping[str, Any]) -> dict[str, float]:
    return by_dataset(validation["metrics"], r"avg@\d+")


def _series(validations: Sequence[Mapping[str, Any]], name: str, divisor: float) -> tuple[list[float], list[float]]:
    rows = [(row["seconds"] / divisor, _sampled(row)[name]) for row in validations if name in _sampled(row)]
    return [time for time, _ in rows], [rate for _, rate in rows]


def _draw_training(axes: Axes, curve: Sequence[Mapping[str, Any]], divisor: float) -> None:
    """Reward and V per iteration, or the loss; the raw values faint behind their running mean."""
    times = _column(curve, "seconds") / divisor
    lines = [
        ("loss", "loss per token", RED, "-"),
        ("reward", "reward", BLUE, "-"),
        ("value", "critic's mean V", ORANGE, (0, (5, 1))),
    ]
    for key, label, colour, dashes in lines:
        raw = _column(curve, key)
        if np.isfinite(raw).any():
            axes.plot(times, raw, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(times, running_mean(raw), color=colour, linewidth=2.0, linestyle=dashes, label=label)
    if np.isfinite(_column(curve, "loss")).any():
        axes.set(title="Training loss", ylabel="negative log-likelihood (nats per token)", yscale="log")
    else:
        axes.set(title="Training reward", ylabel="mean of the iteration", ylim=(0, 1.02))
    legend_below(axes)


def running_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Centred mean over a tenth of `values` `[n]`, over fewer at the ends; NaN counts as missing."""
    numbers = np.asarray(values, dtype=np.float64)
    half = len(numbers) // 20
    windows = [numbers[max(i - half, 0) : i + half + 1] for i in range(len(numbers))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """`[rows]`, NaN where a row has no such number."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)
