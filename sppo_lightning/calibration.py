"""How well predicted chances of success agree with what happened: errors, correlations, reliability bins.

Every function takes predictions, which are the critic's V or the policy's confidence, and the outcomes,
both `[N]` and in [0, 1]. An outcome is the reward of one response or of the majority's, or the pass rate of one
problem: nothing here needs it to be 0 or 1, unless it says so.
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
    """Predictions that are near each other, and what became of them."""

    low: float  # of equal width: the bin is `[low, high)`, 1.0 being in the last one
    high: float  # of equal mass: the smallest and the largest prediction in it
    count: int
    value_mean: float
    outcome_mean: float
    standard_error: float  # of `outcome_mean`, from the unbiased variance; NaN for a single outcome


def reliability_bins(values: Tensor, outcomes: Tensor, bins: int = 10, equal_mass: bool = False) -> list[Bin]:
    """The bins that hold at least one of `values` `[N]`, with their `outcomes` `[N]`.

    Bins have equal width on [0, 1] or, with `equal_mass`, hold as nearly equally many predictions as can be where
    equal ones stay together.
    """
    values, outcomes = values.double(), outcomes.double()
    share = (average_ranks(values) - 0.5) / len(values) if equal_mass else values
    place = (share * bins).long().clamp(0, bins - 1)  # a critic without a sigmoid may leave [0, 1]
    found = []
    for index in place.unique().tolist():
        predicted, inside = values[place == index], outcomes[place == index]
        error = float(inside.std()) / math.sqrt(len(inside)) if len(inside) > 1 else math.nan
        low, high = index / bins, (index + 1) / bins
        if equal_mass:
            low, high = float(predicted.min()), float(predicted.max())
        found.append(Bin(low, high, len(inside), float(predicted.mean()), float(inside.mean()), error))
    return found


def calibration_error(values: Tensor, outcomes: Tensor, bins: int = 10, equal_mass: bool = False) -> float:
    """Expected calibration error: mean over the predictions of `|mean prediction − mean outcome|` of their bin."""
    found = reliability_bins(values, outcomes, bins, equal_mass)
    return sum(b.count * abs(b.value_mean - b.outcome_mean) for b in found) / len(values)


def success_auroc(values: Tensor, outcomes: Tensor) -> Tensor | None:
    """AUROC of `values` `[N]`, outcomes of 0.5 or more being successes; None where all outcomes agree."""
    successes = (outcomes >= 0.5).long()
    return binary_auroc(values, successes) if 0 < int(successes.sum()) < len(successes) else None


def selective_risks(values: Tensor, outcomes: Tensor) -> Tensor:
    """`[N]`: risk, which is 1 − mean outcome, of the 1, 2, … `N` predictions that are the largest.

    Of predictions that are equal, those that count first are drawn at random: the risk is its expectation. The
    mean over all coverages is the area under the risk-coverage curve (AURC), 0 where nothing fails. Source:
    Geifman et al. 2019, arXiv 1805.08206.
    """
    values, outcomes = values.double(), outcomes.double()
    levels, place, counts = values.unique(return_inverse=True, return_counts=True)
    means = torch.zeros_like(levels).index_add_(0, place, outcomes) / counts
    failures = 1.0 - means[place[values.argsort(descending=True)]]
    return failures.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device)


def confidence_metrics(values: Tensor, outcomes: Tensor, bins: int = 10) -> dict[str, float]:
    """How well the policy's confidences `values` `[N]` in its own answers agree with `outcomes` `[N]`.

    `aurc_excess` is the AURC above that of confidences in the order of the outcomes; the rest of the AURC is due to
    the accuracy alone. `auroc` is left out where all outcomes agree.
    """
    aurc = float(selective_risks(values, outcomes).mean())
    metrics = {
        "accuracy": float(outcomes.mean()),
        "mean": float(values.mean()),
        "calibration_error": calibration_error(values, outcomes, bins),
        "calibration_error_equal_mass": calibration_error(values, outcomes, bins, equal_mass=True),
        "aurc": aurc,
        "aurc_excess": aurc - float(selective_risks(outcomes, outcomes).mean()),
    }
    auroc = success_auroc(values, outcomes)
    return metrics if auroc is None else metrics | {"auroc": float(auroc)}


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
    if (auroc := success_auroc(values, outcomes)) is not None:
        metrics["critic/auroc"] = auroc
    return metrics
