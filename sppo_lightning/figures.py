"""Pictures of a run: what it learned over time, and how well the critic foresees the outcome.

Every function takes plain numbers and returns a `matplotlib.figure.Figure`, without pyplot and its global
state, so that they work in any thread and without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from sppo_lightning.evaluation import by_dataset

# Okabe and Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color)
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_DATASETS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
_MARKERS = ("o", "s", "^", "D", "v", "P")  # shape as well as colour tells the data sets apart
_GREY = "#8A8A8A"


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
    divisor, unit = (60.0, "min") if last >= 600 else (1.0, "s")
    _draw_accuracy(held_out, validations, control or (), divisor)
    _draw_training(training, curve, divisor)
    for axes in (held_out, training):
        axes.set(
            xlabel=f"training time ({unit}), validation left out",
            xlim=np.array((-0.03, 1.03)) * last / divisor,
        )
        _tidy(axes)
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
        axes.plot([], [], color=_GREY, linestyle=(0, (4, 2)), label="control")
    axes.set(title="Accuracy on held-out prompts", ylabel="share of sampled responses solved", ylim=(0, 1.02))
    if names:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


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
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def running_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Centred mean over a tenth of `values` `[n]`, over fewer at the ends; NaN counts as missing."""
    numbers = np.asarray(values, dtype=np.float64)
    half = len(numbers) // 20
    windows = [numbers[max(i - half, 0) : i + half + 1] for i in range(len(numbers))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def value_against_reward(values: ArrayLike, rewards: ArrayLike, bins: int = 10) -> Figure:
    """The critic's V against the reward: binned means with their counts, and both distributions.

    Args:
        values: `[N]`, predicted chances of success in [0, 1].
        rewards: `[N]`, outcomes in [0, 1]; those that are NaN have no verdict and are left out.
        bins: Bins of equal width on [0, 1].
    """
    predicted, observed = np.asarray(values, np.float64), np.asarray(rewards, np.float64)
    known = np.isfinite(observed)
    predicted, observed = predicted[known], observed[known]
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), wspace=0.03, hspace=0.03)
    main = figure.add_subplot(grid[1, 0])
    _draw_reliability(main, predicted, observed, bins)
    above = figure.add_subplot(grid[0, 0], sharex=main)
    right = figure.add_subplot(grid[1, 1], sharey=main)
    above.hist(predicted, bins=bins, range=(0, 1), color=SKY, edgecolor="white", linewidth=0.6)
    right.hist(
        observed,
        bins=bins,
        range=(0, 1),
        color=GREEN,
        edgecolor="white",
        linewidth=0.6,
        orientation="horizontal",
    )
    above.set_ylabel("responses", fontsize=8)
    right.set_xlabel("responses", fontsize=8)
    above.tick_params(labelbottom=False, labelsize=8)
    right.tick_params(labelleft=False, labelsize=8)
    for axes in (main, above, right):
        _tidy(axes)
    figure.suptitle(_foresight(predicted, observed), fontsize=11)
    return figure


def _draw_reliability(axes: Axes, values: NDArray, rewards: NDArray, bins: int) -> None:
    """Mean reward of each bin of V, with its standard error and count, against perfect foresight."""
    axes.plot((0, 1), (0, 1), color=_GREY, linestyle="--", linewidth=1.2, label="perfect foresight")
    spread = np.random.default_rng(0).uniform(-0.012, 0.012, len(rewards))  # or equal rewards hide each other
    axes.plot(values, rewards + spread, ".", color=BLUE, alpha=0.25, markersize=4, label="one response")
    place = np.minimum((values * bins).astype(int), bins - 1)
    for index in np.unique(place):
        inside = place == index
        count, mean = int(inside.sum()), rewards[inside].mean()
        centre, error = values[inside].mean(), rewards[inside].std() / np.sqrt(count)
        label = "mean of a bin ± standard error (count)" if index == place.min() else None
        axes.errorbar(centre, mean, yerr=error, fmt="o", color=RED, markersize=7, capsize=3, label=label, zorder=4)
        side = -11 if mean > 0.9 else 9
        axes.annotate(f"{count}", (centre, mean), (8, side), textcoords="offset points", fontsize=8, va="center")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
    axes.set(xlabel="critic's V: predicted chance of success", ylabel="reward R of the response")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.93), framealpha=0.85)


def _foresight(values: NDArray, rewards: NDArray) -> str:
    """One line of numbers: how many, how far apart, how correlated."""
    if not len(values):
        return "no response with a verdict"
    brier = np.square(values - rewards).mean()
    text = f"{len(values)} responses    Brier score {brier:.3f}"
    if values.std() > 1e-9 and rewards.std() > 1e-9:
        text += f"    Pearson {np.corrcoef(values, rewards)[0, 1]:.2f}"
    return text


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """`[rows]`, NaN where a row has no such number."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
