import itertools
import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from sppo_lightning.calibration import (
    Bin,
    average_ranks,
    calibration_error,
    confidence_metrics,
    critic_metrics,
    pearson,
    reliability_bins,
    selective_risks,
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


def test_bins_of_equal_mass_keep_equal_predictions_together():
    values = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.7, 0.3], dtype=torch.float64)
    outcomes = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    first, second, third = reliability_bins(values, outcomes, bins=3, equal_mass=True)
    assert [(b.low, b.high, b.count) for b in (first, second, third)] == [
        (0.1, 0.2, 2),
        (0.3, 0.7, 2),
        (0.8, 0.9, 2),
    ]
    expected = (2 * abs(0.15 - 0.5) + 2 * 0.5 + 2 * abs(0.85 - 1)) / 6
    assert calibration_error(values, outcomes, bins=3, equal_mass=True) == pytest.approx(expected)
    # of equal width, 0.3 is with the first two and 0.7 with the last two
    assert calibration_error(values, outcomes, bins=3) == pytest.approx(
        (3 * abs(0.2 - 1 / 3) + 3 * abs(0.8 - 2 / 3)) / 6
    )
    # the four that are equal have the mean rank 3.5 of 6, and the second bin to themselves
    tied = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.6])
    assert [b.count for b in reliability_bins(tied, outcomes, bins=3, equal_mass=True)] == [1, 4, 1]


def brute_force_risks(values: list[float], outcomes: list[float]) -> list[float]:
    """The mean, over every order of equal predictions, of the failures among the first 1, 2, … of them."""
    orders = [p for p in itertools.permutations(range(len(values))) if sorted_by(values, p)]
    failures = [[1 - outcomes[i] for i in order] for order in orders]
    return [sum(sum(f[:n]) / n for f in failures) / len(failures) for n in range(1, len(values) + 1)]


def sorted_by(values: list[float], order: tuple[int, ...]) -> bool:
    return all(values[a] >= values[b] for a, b in itertools.pairwise(order))


@pytest.mark.parametrize(
    ("values", "outcomes"),
    [
        ([0.9, 0.8, 0.3], [1.0, 0.0, 1.0]),
        ([0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 1.0]),
        ([0.25, 0.75, 0.75, 0.5, 0.25, 0.75], [0.0, 1.0, 0.0, 0.5, 1.0, 0.25]),
        ([0.4, 0.6], [1.0, 1.0]),
        ([0.7], [0.0]),
    ],
)
def test_selective_risks_are_those_of_all_orders(values: list[float], outcomes: list[float]):
    found = selective_risks(torch.tensor(values), torch.tensor(outcomes))
    assert found.tolist() == pytest.approx(brute_force_risks(values, outcomes), abs=1e-12)


def confidence(values: list[float], outcomes: list[float], bins: int = 10) -> dict[str, float]:
    tensors = [torch.tensor(numbers, dtype=torch.float64) for numbers in (values, outcomes)]
    return confidence_metrics(*tensors, bins)


def test_confidence_metrics_by_hand():
    assert confidence([0.95, 0.75, 0.75, 0.25], [1.0, 0.0, 1.0, 0.0]) == pytest.approx(
        {
            "accuracy": 0.5,
            "mean": 0.675,
            "calibration_error": (0.05 + 2 * 0.25 + 0.25) / 4,
            "calibration_error_equal_mass": (0.05 + 2 * 0.25 + 0.25) / 4,
            # the most confident one is right; the next is wrong half of the time, whichever of the two it is
            "aurc": (0 + 0.25 + 1 / 3 + 0.5) / 4,
            "aurc_excess": (0 + 0.25 + 1 / 3 + 0.5) / 4 - (0 + 0 + 1 / 3 + 0.5) / 4,
            "auroc": (1 + 1 + 0.5 + 1) / 4,  # of the pairs of right and wrong, one is a tie
        }
    )


@pytest.mark.parametrize("right", [1.0, 0.0])
def test_where_all_answers_are_right_or_all_are_wrong(right: float):
    assert confidence([0.5, 0.75], [right, right]) == pytest.approx(
        {
            "accuracy": right,
            "mean": 0.625,
            "calibration_error": abs(0.625 - right),
            "calibration_error_equal_mass": abs(0.625 - right),
            "aurc": 1 - right,
            "aurc_excess": 0.0,
        }
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_confidence_metrics_against_the_library_and_brute_force(seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(300, generator=generator) * 16).round().double() / 16  # as of 16 samples, with many ties
    hits = (torch.rand(300, generator=generator) < values.square()).double()
    found = confidence_metrics(values, hits)
    pairs = [(v > w) + (v == w) / 2 for v in values[hits == 1].tolist() for w in values[hits == 0].tolist()]
    assert found["auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    expected = float(binary_calibration_error(values, hits.long(), n_bins=10))
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-6)
    shuffled = torch.randperm(300, generator=generator)
    assert confidence_metrics(values[shuffled], hits[shuffled]) == pytest.approx(found, abs=1e-12)
