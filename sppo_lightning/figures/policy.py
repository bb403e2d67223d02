"""How well the policy's confidence in its own answers tells the right ones from the wrong ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sppo_lightning.calibration import confidence_metrics, reliability_bins, selective_risks
from sppo_lightning.figures.style import BLUE, GREY, ORANGE, counted, legend_below, percent, tidy

_STYLES = ((ORANGE, "s", (0, (5, 1.5))), (BLUE, "o", "-"))  # of the moment before, and of the last


def confidence_figure(
    moments: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], tokens: str = "answer", bins: int = 10
) -> Figure:
    """A row for each kind of confidence: reliability diagram, and risk-coverage curve; moments in one picture.

    Args:
        moments: By name of the moment, one or two in the order of time, and by kind: the confidences and the
            outcomes, `[n]` each and in [0, 1]. Kinds are `agreement` and `token_probability`.
        tokens: Of which tokens the probability is: `answer` or `response`.
        bins: Bins of equal width on [0, 1].
    """
    texts = {
        "agreement": ("Agreement", "share of the responses that give the majority's answer", "problem"),
        "token_probability": ("Token probability", f"mean probability of the {tokens}'s tokens", "response"),
    }
    kinds = [kind for kind in texts if any(kind in pairs for pairs in moments.values())]
    figure = Figure(figsize=(10, 4.6 * len(kinds)), layout="constrained")
    figure.suptitle("Policy calibration", fontsize=13, fontweight="bold")
    for row, kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        title, confidence, unit = texts[kind]
        reliability, risk = row
        reliability.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1.2)
        for (moment, pairs), style in zip(moments.items(), _STYLES[-len(moments) :], strict=True):
            if kind in pairs:
                name = f"{moment}, {counted(len(pairs[kind][0]), unit)}"
                _draw_moment(reliability, risk, name, *pairs[kind], bins, style)
        reliability.set(title=title, xlabel=confidence, ylabel="mean reward ± standard error")
        reliability.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
        risk.set(
            title=f"{title}: risk and coverage", xlabel=f"coverage: share of the {unit}s, most confident first"
        )
        risk.set(ylabel="risk: 1 − mean reward", xlim=(0, 1.03), ylim=(-0.05, 1.05))
        risk.xaxis.set_major_formatter(percent())
        for axes in row:
            tidy(axes)
            legend_below(axes, ncols=1)
    return figure


def _draw_moment(
    reliability: Axes,
    risk: Axes,
    name: str,
    values: Tensor,
    outcomes: Tensor,
    bins: int,
    style: tuple[str, str, str | tuple[float, tuple[float, float]]],
) -> None:
    """Each bin's mean with its standard error, and the risk at each coverage; the areas in the legend."""
    colour, marker, dashes = style
    found = reliability_bins(values, outcomes, bins)
    metrics = confidence_metrics(values, outcomes, bins)
    reliability.errorbar(
        [b.value_mean for b in found],
        [b.outcome_mean for b in found],
        yerr=[b.standard_error for b in found],
        color=colour,
        marker=marker,
        linestyle=dashes,
        linewidth=1.6,
        capsize=3,
        label=f"{name}: ECE {metrics['calibration_error']:.2f}",
    )
    ordering = f", AUROC {metrics['auroc']:.2f}" if "auroc" in metrics else ""
    coverages = np.arange(1, len(values) + 1) / len(values)
    risk.plot(
        coverages,
        selective_risks(values, outcomes).numpy(),
        color=colour,
        linestyle=dashes,
        linewidth=1.8,
        label=f"{name}: AURC {metrics['aurc']:.2f}{ordering}",
    )
