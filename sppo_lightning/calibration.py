"""How well predicted chances of success agree with what happened: errors, correlations, reliability bins.

Every function takes the critic's V and the outcomes, both `[N]` and in [0, 1]. An outcome is the reward of one
response or the pass rate of one problem: nothing here needs it to be 0 or 1, unless it says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors `[n]`; 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    return float((x @ y) / scale) if scale > 1e-12 else 0.0


def average_ranks(x: Tensor) -> Tensor:
    """Ranks of the elements of `x` `[n]`, float64, counted from 1; equal elements share the mean of their ranks."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors `[n]`, ties with average ranks; 0 where one of them does not vary."""
    return pearson(average_ranks(x), average_ranks(y))


@dataclass(frozen=True)
class Bin:
    """The predictions in `[low, high)`, 1.0 being in the last bin, and what became of them."""

    low: float
    high: float
    count: int
    value_mean: float
    outcome_mean: float
    standard_error: float  # of `outcome_mean`, from the unbiased variance; NaN for a single outcome


def reliability_bins(values: Tensor, outcomes: Tensor, bins: int = 10) -> list[Bin]:
    """The bins of equal width on [0, 1] that hold at least one of `values` `[N]`, with their `outcomes` `[N]`."""
    values, outcomes = values.double(), outcomes.double()
    place = (values * bins).long().clamp(0, bins - 1)  # a critic without a sigmoid may leave [0, 1]
    found = []
    for index in place.unique().tolist():
        inside = outcomes[place == index]
        error = float(inside.std()) / math.sqrt(len(inside)) if len(inside) > 1 else math.nan
        means = float(values[place == index].mean()), float(inside.mean())
        found.append(Bin(index / bins, (index + 1) / bins, len(inside), *means, error))
    return found


def calibration_error(values: Tensor, outcomes: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean over the predictions of `|mean V − mean outcome|` of their bin."""
    gaps = [b.count * abs(b.value_mean - b.outcome_mean) for b in reliability_bins(values, outcomes, bins)]
    return sum(gaps) / len(values)


def critic_metrics(values: Tensor, outcomes: Tensor, bins: int = 10) -> dict[str, Tensor]:
    """`critic/…`: how well the predicted chances `values` `[N]` agree with `outcomes` `[N]`.

    `brier_skill` is the share of the mean outcome's squared error that the critic removes: 0 is as good as knowing
    the mean pass rate, below 0 is worse. `auroc` takes an outcome of 0.5 or more as success and is left out where
    all outcomes agree. `calibration_error` is over `bins` bins of equal width.
    """
    values, outcomes = values.contiguous(), outcomes.contiguous()
    brier = (values - outcomes).square().mean()
    metrics = {
        "critic/brier": brier,
        "critic/pearson": torch.tensor(pearson(values, outcomes)),
        "critic/spearman": torch.tensor(spearman(values, outcomes)),
        "critic/calibration_error": torch.tensor(calibration_error(values, outcomes, bins)),
    }
    spread = outcomes.var(correction=0)
    if spread > 1e-12:  # equal rewards such as 0.1 have a rounding error for a variance
        metrics["critic/brier_skill"] = 1.0 - brier / spread
    successes = (outcomes >= 0.5).long()
    if 0 < int(successes.sum()) < len(successes):
        metrics["critic/auroc"] = binary_auroc(values, successes)
    return metrics
