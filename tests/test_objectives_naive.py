"""Objectives and value losses against double loops over Python's own numbers, derivatives written out."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vectors import AGGREGATIONS

from sppo_lightning.objectives import (
    BinaryCrossEntropy,
    ClippedSquaredError,
    ImportanceWeightedObjective,
    Objective,
    SequenceClipObjective,
    TokenClipObjective,
    ValueLoss,
)

SEEDS = range(30)
Grid = list[list[float]]
Answer = tuple[float, Grid]  # a loss, and its derivative with respect to each log-probability


class Rows:
    """20 responses of 1 to 8 tokens and one of none; ratios of 0.3 to 3, most of them."""

    def __init__(self, draw: random.Random, token_advantages: bool) -> None:
        self.lengths = [0, *(draw.randint(1, 8) for _ in range(20))]
        self.old = [[draw.gauss(-2, 1) for _ in range(n)] for n in self.lengths]
        self.log_probs = [[x + draw.gauss(0, 0.5) for x in row] for row in self.old]
        self.advantages = [[draw.gauss(0, 1)] * n for n in self.lengths]
        if token_advantages:
            self.advantages = [[draw.gauss(0, 1) for _ in row] for row in self.advantages]
        self.token_advantages = token_advantages

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an objective takes, with garbage behind the mask and for the response without tokens."""
        mask, advantages = padded([[1.0] * n for n in self.lengths], 0.0), padded(self.advantages, math.nan)
        if not self.token_advantages:
            advantages = advantages[:, 0]
        return padded(self.log_probs, math.nan), padded(self.old, math.inf), advantages, mask

    def count(self, unit: str) -> int:
        return sum(self.lengths) if unit == "tokens" else sum(n > 0 for n in self.lengths)


def padded(rows: Grid, filler: float) -> Tensor:
    return torch.tensor([row + [filler] * (8 - len(row)) for row in rows], dtype=torch.float64)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def clipped_surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """`−min(r A, clip(r) A)` and its derivative with respect to ln r."""
    free, bound = ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage
    return (-free, -free) if free <= bound else (-bound, 0.0)


def loop_over_tokens(
    rows: Rows, each: Callable[[int, int], tuple[float, float]], settings: dict[str, Any], count: int
) -> Answer:
    loss, slopes = 0.0, [[0.0] * 8 for _ in rows.lengths]
    for i, length in enumerate(rows.lengths):
        for t in range(length):
            token_loss, slope = each(i, t)
            share = 1 / count / settings.get("constant_length", 1)
            if settings["aggregation"] == "seq-mean-token-mean":
                share /= length
            loss += share * token_loss
            slopes[i][t] = share * slope
    return loss, slopes


def token_clip(rows: Rows, count: int, **s: Any) -> Answer:
    def each(i: int, t: int) -> tuple[float, float]:
        advantage = rows.advantages[i][t]
        ratio = math.exp(rows.log_probs[i][t] - rows.old[i][t])
        loss, slope = clipped_surrogate(ratio, advantage, s["clip_low"], s["clip_high"])
        if advantage < 0 and loss > -s["dual_clip"] * advantage:
            return -s["dual_clip"] * advantage, 0.0
        return loss, slope

    return loop_over_tokens(rows, each, s, count)


def importance_weighted(rows: Rows, count: int, **s: Any) -> Answer:
    def each(i: int, t: int) -> tuple[float, float]:
        steps = range(rows.lengths[i]) if s["level"] == "sequence" else [t]
        ratio = math.prod(math.exp(rows.log_probs[i][u] - rows.old[i][u]) for u in steps)
        slope = -clip(ratio, s["min_weight"], s["max_weight"]) * rows.advantages[i][t]
        return slope * rows.log_probs[i][t], slope

    return loop_over_tokens(rows, each, s, count)


def sequence_clip(rows: Rows, count: int, **s: Any) -> Answer:
    loss, slopes = 0.0, [[0.0] * 8 for _ in rows.lengths]
    for i, length in enumerate(rows.lengths):
        if length == 0:
            continue
        ratio = math.prod(math.exp(rows.log_probs[i][t] - rows.old[i][t]) for t in range(length))
        power = 1 / length if s["normalize"] == "length" else 1.0
        row_loss, slope = clipped_surrogate(ratio**power, rows.advantages[i][0], s["clip_low"], s["clip_high"])
        loss += row_loss / count
        for t in range(length):
            slopes[i][t] = slope * power / count
    return loss, slopes


def token_settings(draw: random.Random) -> dict[str, Any]:
    aggregation = draw.choice(AGGREGATIONS)
    constant = {"constant_length": draw.randint(1, 20)} if aggregation == "seq-mean-token-sum" else {}
    return {"aggregation": aggregation, **constant}


def drawn(name: str, draw: random.Random) -> tuple[Objective, Callable[[Rows, int], Answer], Rows]:
    """An objective with random settings, its double loop, and rows for both."""
    low, high = draw.choice([0.1, 0.2, 0.9]), draw.choice([0.1, 0.28, 1.5])
    if name == "token clip":
        settings = token_settings(draw) | {"clip_low": low, "clip_high": high}
        settings["dual_clip"] = draw.choice([1.05, 1.5, 3.0, math.inf])
        rows = Rows(draw, token_advantages=draw.random() < 0.5)
        return TokenClipObjective(**settings), lambda r, n: token_clip(r, n, **settings), rows
    if name.startswith("sequence clip"):
        settings = {"clip_low": low, "clip_high": high, "normalize": name.split()[-1]}
        return SequenceClipObjective(**settings), lambda r, n: sequence_clip(r, n, **settings), Rows(draw, False)
    settings = token_settings(draw) | {"level": name.split()[-1]}
    settings |= {"min_weight": draw.choice([0.0, 0.7]), "max_weight": draw.choice([1.2, 4.0, math.inf])}
    rows = Rows(draw, token_advantages=draw.random() < 0.5)
    return ImportanceWeightedObjective(**settings), lambda r, n: importance_weighted(r, n, **settings), rows


def cut(draw: random.Random, rows: int, seed: int) -> list[list[int]]:
    """The rows in one, two or seven micro-batches of any sizes, as they stand or shuffled."""
    parts, shuffled = ((1, True), (2, False), (2, True), (7, True), (7, False))[seed % 5]
    order = draw.sample(range(rows), rows) if shuffled else list(range(rows))
    ends = [0, *sorted(draw.sample(range(1, rows), parts - 1)), rows]
    return [order[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def assert_equal(actual: Tensor, expected: Any, tolerance: float) -> None:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), wanted, rtol=tolerance, atol=tolerance)


NAMES = [
    "token clip",
    "sequence clip none",
    "sequence clip length",
    "importance weighted token",
    "importance weighted sequence",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_objective_is_its_double_loop_however_it_is_cut(name: str, seed: int):
    draw = random.Random(f"{name} {seed}")
    objective, naive, rows = drawn(name, draw)
    count = rows.count(objective.denominator_unit)
    denominator = torch.tensor(count, dtype=torch.float64)
    log_probs, old, advantages, mask = rows.tensors()
    log_probs.requires_grad_()
    loss, _ = objective(log_probs, old, advantages, mask, denominator)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    expected_loss, expected_gradient = naive(rows, count)
    assert_equal(loss, expected_loss, 1e-9)
    assert_equal(gradient, expected_gradient, 1e-9)
    total = torch.zeros((), dtype=torch.float64)
    for part in cut(draw, len(rows.lengths), seed):
        share, _ = objective(log_probs[part], old[part], advantages[part], mask[part], denominator)
        share.backward()
        total += share.detach()
    assert_equal(total, loss.detach(), 1e-12)
    assert log_probs.grad is not None
    assert_equal(log_probs.grad, gradient, 1e-12)


def cross_entropy(output: float, old: float, target: float) -> tuple[float, float]:
    chance = 1 / (1 + math.exp(-output))
    return -target * math.log(chance) - (1 - target) * math.log(1 - chance), chance - target


def squared_error(bound: float) -> Callable[[float, float, float], tuple[float, float]]:
    def each(output: float, old: float, target: float) -> tuple[float, float]:
        held = clip(output, old - bound, old + bound)
        free, clipped = (output - target) ** 2 / 2, (held - target) ** 2 / 2
        if math.isclose(held, output) or free > clipped:
            return free, output - target
        return clipped, 0.0

    return each


@pytest.mark.parametrize(
    ("loss", "each"),
    [
        (BinaryCrossEntropy(), cross_entropy),
        *((ClippedSquaredError(bound), squared_error(bound)) for bound in (0.1, 0.5, 2.0, math.inf)),
    ],
    ids=["binary cross-entropy", "0.1", "0.5", "2.0", "no bound"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_value_loss_is_its_loop_however_it_is_cut(loss: ValueLoss, each: Any, seed: int):
    draw, rows, count = random.Random(seed), 60, 97
    numbers = [(draw.gauss(0, 1), draw.gauss(0, 1), draw.choice([0.0, 1.0, draw.random()])) for _ in range(rows)]
    outputs, old, targets = torch.tensor(numbers, dtype=torch.float64).unbind(dim=1)
    denominator, outputs = torch.tensor(count, dtype=torch.float64), outputs.clone().requires_grad_()
    whole = loss(outputs, old, targets, denominator)
    (gradient,) = torch.autograd.grad(whole, outputs)
    answers = [each(*row) for row in numbers]
    assert_equal(whole, sum(answer for answer, _ in answers) / count, 1e-9)
    assert_equal(gradient, [slope / count for _, slope in answers], 1e-9)
    total = torch.zeros((), dtype=torch.float64)
    for part in cut(draw, rows, seed):
        share = loss(outputs[part], old[part], targets[part], denominator)
        share.backward()
        total += share.detach()
    assert_equal(total, whole.detach(), 1e-12)
    assert outputs.grad is not None
    assert_equal(outputs.grad, gradient, 1e-12)
