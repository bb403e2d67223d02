"""How well the critic foresees the outcome, and what its values do along a response."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from sppo_lightning.calibration import Bin, critic_metrics, reliability_bins
from sppo_lightning.figures.style import BLUE, GREEN, GREY, ORANGE, RED, SKY, counted, legend_below, percent, tidy

_NUMBERS = {  # in the corner, from top to bottom
    "critic/brier_skill": "Brier skill",
    "critic/pearson": "Pearson",
    "critic/spearman": "Spearman",
    "critic/calibration_error": "ECE",
}


def value_against_reward(values: ArrayLike, rewards: ArrayLike, bins: int = 10) -> Figure:
    """The critic's V against the rewards of single responses: binned means, distributions and the metrics.

    Args:
        values: `[N]`, predicted chances of success in [0, 1].
        rewards: `[N]`, outcomes in [0, 1]; those that are NaN have no verdict and are left out.
        bins: Bins of equal width on [0, 1].
    """
    return _reliability(values, rewards, bins, "response", "reward R of the response", "V against reward")


def calibration_figure(
    values: ArrayLike, pass_rates: ArrayLike, bins: int = 10, title: str = "Critic calibration"
) -> Figure:
    """The critic's V against the pass rates of held-out problems: reliability diagram, distributions, metrics.

    Args:
        values: `[M]`, predicted chances of success in [0, 1].
        pass_rates: `[M]`, share of each problem's sampled responses that succeeded.
        bins: Bins of equal width on [0, 1].
        title: Stands above the figure.
    """
    return _reliability(values, pass_rates, bins, "problem", "pass rate of the problem's responses", title)


def _reliability(values: ArrayLike, outcomes: ArrayLike, bins: int, unit: str, outcome: str, title: str) -> Figure:
    """Outcomes over V with V's distribution above, the outcomes' at the right and the metrics in the corner."""
    predicted, observed = np.asarray(values, np.float64), np.asarray(outcomes, np.float64)
    known = np.isfinite(observed)
    predicted, observed = predicted[known], observed[known]
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    figure.suptitle(f"{title}, {counted(len(predicted), unit)}", fontsize=12, fontweight="bold")
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1.1), height_ratios=(1.1, 4), wspace=0.03, hspace=0.03)
    main = figure.add_subplot(grid[1, 0])
    above, right = figure.add_subplot(grid[0, 0], sharex=main), figure.add_subplot(grid[1, 1], sharey=main)
    corner = figure.add_subplot(grid[0, 1])
    if len(predicted):
        both = torch.from_numpy(predicted), torch.from_numpy(observed)
        _draw_reliability(main, predicted, observed, reliability_bins(*both, bins), unit)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
        _write_numbers(corner, {name: float(v) for name, v in critic_metrics(*both, bins).items()})
    corner.set_axis_off()
    above.hist(predicted, bins=bins, range=(0, 1), color=SKY, edgecolor="white", linewidth=0.6)
    right.hist(
        observed, bins=bins, range=(0, 1), color=GREEN, edgecolor="white", linewidth=0.6, orientation="horizontal"
    )
    above.set_ylabel(f"{unit}s", fontsize=8)
    right.set_xlabel(f"{unit}s", fontsize=8)
    above.tick_params(labelbottom=False, labelsize=8)
    right.tick_params(labelleft=False, labelsize=8)
    main.set(
        xlim=(-0.03, 1.03), ylim=(-0.05, 1.05), xlabel="critic's V: predicted chance of success", ylabel=outcome
    )
    for axes in (main, above, right):
        tidy(axes)
    return figure


def _write_numbers(axes: Axes, metrics: dict[str, float]) -> None:
    """A little table, its last line at the bottom."""
    shown = [(text, metrics[name]) for name, text in _NUMBERS.items() if name in metrics]
    for line, (text, number) in enumerate(reversed(shown)):
        axes.text(0.0, 0.02 + 0.17 * line, text, fontsize=8.5)
        axes.text(1.0, 0.02 + 0.17 * line, f"{number:.2f}", fontsize=8.5, ha="right")


def _draw_reliability(axes: Axes, values: NDArray, outcomes: NDArray, bins: list[Bin], unit: str) -> None:
    """Each outcome faintly, the mean of each bin of V with its standard error and count, and the diagonal."""
    axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1.2, label="perfect calibration")
    spread = np.random.default_rng(0).uniform(-0.012, 0.012, len(outcomes))  # or equal outcomes hide each other
    axes.plot(values, outcomes + spread, ".", color=BLUE, alpha=0.25, markersize=6, label=f"one {unit}", mew=0)
    centres, means = [b.value_mean for b in bins], [b.outcome_mean for b in bins]
    axes.errorbar(
        centres,
        means,
        yerr=[b.standard_error for b in bins],
        fmt="o-",
        color=RED,
        markersize=7,
        linewidth=1.4,
        capsize=3,
        label="mean of a bin ± standard error (count)",
        zorder=4,
    )
    for b in bins:
        at = (b.value_mean, b.outcome_mean)
        axes.annotate(f"{b.count}", at, (7, -10), textcoords="offset points", fontsize=8, va="center", zorder=5)


def tail_effect_figure(
    correct: ArrayLike, wrong: ArrayLike, *, title: str = "A token-level critic along the response"
) -> Figure:
    """Mean V(s_t) with its standard deviation over the relative position in the response, correct against wrong.

    Args:
        correct: `[n, bins]`, one row per correct response: V(s_t) averaged over the tokens of each of `bins` equal
            parts of the response; NaN for a part without a token.
        wrong: `[n, bins]`, the same of the wrong responses; `n` and `bins` may differ.
        title: Stands above the figure.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots()
    for rows, name, colour, dashes in ((correct, "correct", BLUE, "-"), (wrong, "wrong", ORANGE, (0, (5, 1.5)))):
        table = np.asarray(rows, np.float64)
        if not table.size:
            continue
        known = np.isfinite(table).any(axis=0)
        places = (np.arange(table.shape[1])[known] + 0.5) / table.shape[1]
        mean, spread = np.nanmean(table[:, known], axis=0), np.nanstd(table[:, known], axis=0)
        label = f"{name} ({counted(len(table), 'response')})"
        axes.plot(places, mean, color=colour, linestyle=dashes, linewidth=2.2, label=label, zorder=3)
        axes.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
    axes.margins(0)
    low, high = axes.get_ylim()  # a value head without a sigmoid may leave [0, 1]
    axes.set(xlim=(0, 1), ylim=(min(low, 0.0), max(high, 1.02)))
    axes.set(xlabel="position in the response", ylabel="$V(s_t)$, mean ± standard deviation")
    axes.xaxis.set_major_formatter(percent())
    tidy(axes)
    legend_below(axes)
    return figure
