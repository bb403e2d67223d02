"""How differently hard the race's prompts are: pass rates of the warm starts before any reinforcement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from chains import chains, pass_rates
from matplotlib.figure import Figure

from sppo_lightning.figures.style import BLUE, percent, tidy
from sppo_lightning.models import CausalLMPolicy

PROMPTS, SAMPLES = 200, 64  # held-out chains, and responses to each


def measure(model: Path) -> list[float]:
    """Share of the responses at temperature 1 that are right, for each of the prompts."""
    policy = CausalLMPolicy(str(model))
    policy.build()
    return pass_rates(policy, chains(policy, PROMPTS), SAMPLES).tolist()


def spread(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Quantiles over all warm starts, and how much of the variance of R lies between prompts.

    The latter is the most that a baseline which reads the prompt can take away from the variance of A; a mean over
    the batch takes nothing of it.
    """
    between, total = [], []
    for row in rates.values():
        p = np.asarray(row)
        noise = (p * (1 - p)).mean() / (SAMPLES - 1)  # what finitely many samples add to the variance of the rates
        between.append(p.var() - noise)
        total.append(p.mean() * (1 - p.mean()))
    everything = np.concatenate([np.asarray(row) for row in rates.values()])
    quantiles = {f"q{q}": float(np.quantile(everything, q / 100)) for q in (10, 25, 50, 75, 90)}
    return {"mean": float(everything.mean()), **quantiles, "between": float(np.sum(between) / np.sum(total))}


def pass_rate_figure(rates: Mapping[str, Sequence[float]]) -> Figure:
    """A histogram, mean over the warm starts with the lowest and the highest as a bar."""
    counts = np.stack([np.histogram(row, 10, (0, 1))[0] / len(row) for row in rates.values()])
    mean = counts.mean(0)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    reach = np.stack([mean - counts.min(0), counts.max(0) - mean])
    axes.bar(np.arange(10) / 10 + 0.05, mean, 0.092, color=BLUE, yerr=reach, ecolor="#555555", capsize=3)
    axes.set_title(f"Pass rates of the prompts before training, {len(rates)} warm starts", fontsize=11)
    axes.set_xlabel(f"share of {SAMPLES} responses solved")
    axes.set_ylabel("share of the prompts")
    axes.xaxis.set_major_formatter(percent())
    axes.yaxis.set_major_formatter(percent())
    tidy(axes)
    return figure


def report(models: Mapping[str, Path], figures: Path) -> dict[str, Any]:
    """Measure every warm start and draw `race_pass_rates.png`; what `race.json` says of them."""
    rates = {name: measure(path) for name, path in models.items()}
    pass_rate_figure(rates).savefig(figures / "race_pass_rates.png", dpi=110)
    return {"rates": rates, **spread(rates)}
