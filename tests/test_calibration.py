import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from sppo_lightning.calibration import (
    Bin,
    average_ranks,
    calibration_error,
    critic_metrics,
    pearson,
    reliability_bins,
    spearman,
)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),
        ([0.3, 0.3, 0.3], [1.0, 0.0, 1.0], 0.0),  # no variation, no correlation
        ([0.5], [1.0], 0.0),
    ],
)
def test_pearson(x: list[float], y: list[float], expected: float):
    assert pearson(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([0.2, 0.9, 0.5], [1, 3, 2]),
        ([0.5, 0.5, 0.1], [2.5, 2.5, 1]),
        ([3.0, 1.0, 3.0, 3.0, 2.0, 1.0], [5, 1.5, 5, 5, 3, 1.5]),
        ([7.0], [1]),
    ],
)
def test_ties_share_the_mean_of_their_ranks(x: list[float], expected: list[float]):
    assert average_ranks(torch.tensor(x)).tolist() == expected


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 10.0, 1000.0], 1.0),  # rising is all it asks for
        ([1.0, 2.0, 3.0, 4.0], [9.0, 4.0, 1.0, 0.0], -1.0),
        # without ties 1 − 6 Σd² / (n (n² − 1)), here with d = (0, −1, 1, 0)
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 1 - 6 * 2 / (4 * 15)),
        # ranks 1, 2, 3.5, 5, 3.5 against 1 to 5: 8 / sqrt(10 · 9.5)
        ([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 6.0, 7.0, 8.0, 7.0], 8 / math.sqrt(95)),
        ([0.3, 0.3, 0.3], [1.0, 0.0, 1.0], 0.0),
        ([0.5], [1.0], 0.0),
    ],
)
def test_spearman(x: list[float], y: list[float], expected: float):
    assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-12)
    assert spearman(torch.tensor(y), torch.tensor(x)) == pytest.approx(expected, abs=1e-12)


def test_reliability_bins_by_hand():
    values = torch.tensor([0.25, 0.49, 0.5, 1.0, 0.875], dtype=torch.float64)
    outcomes = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.25], dtype=torch.float64)
    first, third, last = reliability_bins(values, outcomes, bins=4)
    # the standard error of (0, ½) is sqrt(1/8) / sqrt(2), that of (1, ¼) is sqrt(9/32) / sqrt(2)
    assert first == Bin(0.25, 0.5, 2, pytest.approx(0.37), pytest.approx(0.25), pytest.approx(0.25))
    assert (third.low, third.high, third.count, third.value_mean, third.outcome_mean) == (0.5, 0.75, 1, 0.5, 1.0)
    assert math.isnan(third.standard_error)
    assert last == Bin(0.75, 1.0, 2, 0.9375, 0.625, pytest.approx(0.375))
    expected = (2 * 0.12 + 1 * 0.5 + 2 * 0.3125) / 5
    assert calibration_error(values, outcomes, bins=4) == pytest.approx(expected)


def test_values_outside_of_0_and_1_are_in_the_outer_bins():
    low, high = reliability_bins(torch.tensor([-0.5, 0.25, 1.5]), torch.tensor([0.0, 1.0, 1.0]), bins=2)
    assert (low.count, low.value_mean, low.outcome_mean) == (2, -0.125, 0.5)
    assert (high.low, high.high, high.count, high.value_mean) == (0.5, 1.0, 1, 1.5)


def test_pass_rates_are_no_hits_and_misses():
    # V is the pass rate itself: no error, where rates cut at ½ would make it 0.4 and 0.3
    rates = [0.4, 0.7]
    assert critic(rates, rates)["calibration_error"] == pytest.approx(0.0, abs=1e-7)
    assert critic(rates, rates)["brier_skill"] == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [5, 10])
def test_the_calibration_error_of_hits_and_misses_is_the_librarys(bins: int):
    generator = torch.Generator().manual_seed(bins)
    values = torch.rand(400, generator=generator)
    outcomes = (torch.rand(400, generator=generator) < values.square()).long()
    expected = float(binary_calibration_error(values, outcomes, n_bins=bins))
    assert calibration_error(values, outcomes, bins) == pytest.approx(expected, abs=1e-6)
    assert float(critic_metrics(values, outcomes.float(), bins)["critic/calibration_error"]) == pytest.approx(
        expected, abs=1e-6
    )


def critic(values: list[float], rewards: list[float]) -> dict[str, float]:
    tensors: list[Tensor] = [torch.tensor(values), torch.tensor(rewards)]
    return {name.removeprefix("critic/"): float(value) for name, value in critic_metrics(*tensors).items()}


def test_critic_metrics_by_hand():
    metrics = critic([0.9, 0.35, 0.62, 0.2], [1.0, 1.0, 0.0, 0.0])
    brier = (0.1**2 + 0.65**2 + 0.62**2 + 0.2**2) / 4
    assert metrics["brier"] == pytest.approx(brier, abs=1e-6)
    assert metrics["brier_skill"] == pytest.approx(1 - brier / 0.25, abs=1e-6)  # the rewards' variance is 1/4
    assert metrics["auroc"] == pytest.approx(3 / 4)  # of the four pairs only (0.35, 0.62) is in the wrong order
    # each value has a bin of its own, so the gaps are |0.9 − 1|, |0.35 − 1|, 0.62 and 0.2
    assert metrics["calibration_error"] == pytest.approx((0.1 + 0.65 + 0.62 + 0.2) / 4, abs=1e-6)
    centred = [0.9 - 0.5175, 0.35 - 0.5175, 0.62 - 0.5175, 0.2 - 0.5175]
    expected = (centred[0] + centred[1]) / 2 - (centred[2] + centred[3]) / 2
    assert metrics["pearson"] == pytest.approx(expected / math.sqrt(sum(c * c for c in centred)), abs=1e-6)
    # ranks 4, 2, 3, 1 against 3.5, 3.5, 1.5, 1.5
    assert metrics["spearman"] == pytest.approx(2 / math.sqrt(5 * 4), abs=1e-6)


def test_a_critic_that_knows_only_the_mean_has_no_skill():
    metrics = critic([0.75] * 4, [1.0, 1.0, 1.0, 0.0])
    assert metrics["brier_skill"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["pearson"] == 0.0
    assert metrics["auroc"] == pytest.approx(0.5)
    assert metrics["calibration_error"] == pytest.approx(0.0, abs=1e-6)


def test_metrics_without_meaning_are_left_out():
    always = {"brier", "pearson", "spearman", "calibration_error"}
    assert set(critic([0.5, 0.25], [1.0, 1.0])) == always
    assert set(critic([0.5, 0.25], [0.75, 0.5])) == always | {"brier_skill"}
    assert set(critic([0.5] * 7, [0.1] * 7)) == always  # variance 1e-17, not 0
