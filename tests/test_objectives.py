import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vectors import AGGREGATIONS, assert_close, logs, tensor

from sppo_lightning.errors import InputError
from sppo_lightning.objectives import (
    BinaryCrossEntropy,
    ClippedSquaredError,
    ImportanceWeightedObjective,
    Objective,
    SequenceClipObjective,
    TokenClipObjective,
)

# Two responses of three tokens and of one, with A = 2 and A = −1.
RATIOS = [[1.1, 1.5, 0.5], [4.0, 9.0, 9.0]]
MASK = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
ADVANTAGES = tensor(2.0, -1.0)


def loss_and_gradient(objective: Objective, advantages: Tensor, denominator: float) -> tuple[Tensor, Tensor]:
    log_probs = (logs(*RATIOS) - 3).requires_grad_()
    loss, _ = objective(log_probs, torch.full((2, 3), -3.0), advantages, MASK, tensor(denominator)[0])
    loss.backward()
    assert log_probs.grad is not None
    return loss.detach(), log_probs.grad


# ---------------------------------------------------------------- policy objectives


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        # −2.2, −2.4 (clipped above) and −1.0 of the first; 3 (dual clip) of the second
        ({}, (-5.6 + 3.0) / 8, [[-2.2 / 8, 0.0, -1.0 / 8], [0.0, 0.0, 0.0]]),
        ({"dual_clip": math.inf}, (-5.6 + 4.0) / 8, [[-2.2 / 8, 0.0, -1.0 / 8], [4.0 / 8, 0.0, 0.0]]),
        ({"clip_high": 0.6}, (-6.2 + 3.0) / 8, [[-2.2 / 8, -3.0 / 8, -1.0 / 8], [0.0, 0.0, 0.0]]),
        ({"clip_high": 0.05}, (-5.2 + 3.0) / 8, [[0.0, 0.0, -1.0 / 8], [0.0, 0.0, 0.0]]),
        ({"aggregation": "seq-mean-token-sum"}, -2.6 / 8, [[-2.2 / 8, 0.0, -1.0 / 8], [0.0, 0.0, 0.0]]),
        ({"aggregation": "seq-mean-token-mean"}, (-5.6 / 3 + 3) / 8, [[-2.2 / 24, 0, -1 / 24], [0.0, 0.0, 0.0]]),
        # Dr. GRPO: the same number of tokens for every response
        (
            {"aggregation": "seq-mean-token-sum", "constant_length": 10},
            -2.6 / 80,
            [[-2.2 / 80, 0.0, -1.0 / 80], [0.0, 0.0, 0.0]],
        ),
    ],
)
def test_token_clip_by_hand(settings: dict[str, Any], loss: float, gradient: list[list[float]]):
    objective = TokenClipObjective(**settings)
    for advantages in (ADVANTAGES, ADVANTAGES[:, None].expand(2, 3)):
        actual, actual_gradient = loss_and_gradient(objective, advantages, 8)
        assert_close(actual, loss, 1e-8)
        assert_close(actual_gradient, gradient, 1e-8)


def test_token_clip_below_by_hand():
    # A = −2: the ratio 0.5 is clipped to 0.8 or 0.6, and 1.1 is not
    for clip_low, loss, gradient in ((0.2, 1.6 + 2.2, 0.0), (0.4, 1.2 + 2.2, 0.0), (0.6, 1.0 + 2.2, 1.0)):
        log_probs = logs([0.5, 1.1]).requires_grad_()
        arguments = torch.zeros(1, 2), tensor(-2.0), torch.ones(1, 2), tensor(2.0)[0]
        actual, _ = TokenClipObjective(clip_low=clip_low)(log_probs, *arguments)
        actual.backward()
        assert_close(actual.detach(), loss / 2, 1e-7)
        assert_close(log_probs.grad, [[gradient / 2, 1.1]], 1e-7)


def test_each_token_may_have_its_own_advantage():
    # −1.1, 1.5 (above, but the unclipped side is the worse) and −2 · 0.5; 0.5 · 3 (dual clip)
    advantages = tensor([1.0, -1.0, 2.0], [-0.5, math.nan, math.nan])
    loss, gradient = loss_and_gradient(TokenClipObjective(), advantages, 4)
    assert_close(loss, (-1.1 + 1.5 - 1.0 + 1.5) / 4, 1e-8)
    assert_close(gradient, [[-1.1 / 4, 1.5 / 4, -1.0 / 4], [0.0, 0.0, 0.0]], 1e-8)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [[1.1, 1.2, 0.5], [1.2]]),
        ({"min_weight": 0.9, "max_weight": 2.0}, [[1.1, 1.5, 0.9], [2.0]]),
        ({"max_weight": math.inf}, [[1.1, 1.5, 0.5], [4.0]]),
        # the joint ratios are 1.1 · 1.5 · 0.5 = 0.825 and 4
        ({"level": "sequence"}, [[0.825] * 3, [1.2]]),
        ({"level": "sequence", "min_weight": 0.9, "max_weight": 5.0}, [[0.9] * 3, [4.0]]),
    ],
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_importance_weights_by_hand(settings: dict[str, Any], weights: list[list[float]], aggregation: Any):
    loss, gradient = loss_and_gradient(
        ImportanceWeightedObjective(aggregation=aggregation, **settings), ADVANTAGES, 5
    )
    shares = (1 / 15, 1 / 5) if aggregation == "seq-mean-token-mean" else (1 / 5, 1 / 5)
    slopes = [-2 * weight * shares[0] for weight in weights[0]], [weights[1][0] * shares[1], 0.0, 0.0]
    log_probs = [[math.log(ratio) - 3 for ratio in row] for row in RATIOS]
    assert_close(gradient, list(slopes), 1e-8)
    assert_close(loss, sum(s * x for i in (0, 1) for s, x in zip(slopes[i], log_probs[i], strict=True)), 1e-7)


def test_importance_weights_with_a_constant_length():
    settings: dict[str, Any] = {"aggregation": "seq-mean-token-sum", "constant_length": 4}
    _, gradient = loss_and_gradient(ImportanceWeightedObjective(**settings), ADVANTAGES, 2)
    assert_close(gradient, [[-2.2 / 8, -2.4 / 8, -1.0 / 8], [1.2 / 8, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        # joint ratios 0.825 and 4; A = −1 keeps the gradient of a ratio above
        ({"normalize": "none"}, (-1.65 + 4.0) / 2, [-1.65 / 2, 4.0 / 2]),
        # the geometric mean of three is 0.825^(1/3)
        ({}, (-2 * 0.825 ** (1 / 3) + 4.0) / 2, [-2 * 0.825 ** (1 / 3) / 6, 4.0 / 2]),
    ],
)
def test_sequence_clip_by_hand(settings: dict[str, Any], loss: float, slopes: list[float]):
    actual, gradient = loss_and_gradient(SequenceClipObjective(**settings), ADVANTAGES, 2)
    assert_close(actual, loss)
    assert_close(gradient, [[slopes[0]] * 3, [slopes[1], 0.0, 0.0]])
    # with the signs turned: 0.825 is not clipped at 0.2, but at 0.1; 4 is clipped at 1.2 or 1.5
    actual, gradient = loss_and_gradient(SequenceClipObjective(normalize="none"), -ADVANTAGES, 2)
    assert_close(actual, (1.65 - 1.2) / 2)
    assert_close(gradient, [[1.65 / 2] * 3, [0.0, 0.0, 0.0]])
    actual, gradient = loss_and_gradient(SequenceClipObjective(0.1, 0.5, "none"), -ADVANTAGES, 2)
    assert_close(actual, (1.8 - 1.5) / 2)
    assert_close(gradient, [[0.0] * 3, [0.0, 0.0, 0.0]])


def test_what_an_objective_asks_for():
    assert TokenClipObjective().denominator_unit == "tokens"
    for aggregation in AGGREGATIONS[1:]:
        assert TokenClipObjective(aggregation=aggregation).denominator_unit == "sequences"  # type: ignore[arg-type]
    assert SequenceClipObjective().denominator_unit == "sequences"
    assert not SequenceClipObjective().needs_reference
    assert SequenceClipObjective(against="reference").needs_reference


# ---------------------------------------------------------------- the critic's losses


def test_binary_cross_entropy_by_hand():
    # sigmoid(ln 3) = 3/4; the old values do not matter
    logits = tensor(math.log(3), math.log(3)).requires_grad_()
    loss = BinaryCrossEntropy()(logits, tensor(math.nan, math.nan), tensor(1.0, 0.5), tensor(4.0)[0])
    loss.backward()
    assert_close(BinaryCrossEntropy().predict(logits.detach()), [0.75, 0.75])
    assert_close(loss.detach(), (-math.log(0.75) - (math.log(0.75) + math.log(0.25)) / 2) / 4)
    assert_close(logits.grad, [-0.25 / 4, 0.25 / 4])
    with pytest.raises(ValueError, match=r"`rewards`\[1\]=1.25 is outside \[0, 1\]; rescale the rewards."):
        BinaryCrossEntropy()(logits, logits, tensor(1.0, 1.25), tensor(4.0)[0])


def test_clipped_squared_error_by_hand():
    # within the range; clipped on the way to the target; past the range and away from the target
    outputs = tensor(0.25, 0.75, 0.75).requires_grad_()
    arguments = torch.zeros(3), tensor(1.0, 1.0, -1.0), tensor(4.0)[0]
    loss = ClippedSquaredError()(outputs, *arguments)
    loss.backward()
    assert_close(loss.detach(), (0.28125 + 0.125 + 1.53125) / 4)
    assert_close(outputs.grad, [-0.75 / 4, 0.0, 1.75 / 4])
    assert_close(ClippedSquaredError(math.inf)(outputs.detach(), *arguments), (0.28125 + 0.03125 + 1.53125) / 4)
    assert torch.equal(ClippedSquaredError().predict(outputs), outputs)


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), ClippedSquaredError()])
def test_values_of_no_rows_are_no_loss(loss: Any):
    outputs = torch.zeros(0, requires_grad=True)
    total = loss(outputs, torch.zeros(0), torch.zeros(0), tensor(3.0)[0])
    total.backward()
    assert total.item() == 0.0
    assert outputs.grad is not None


# ---------------------------------------------------------------- what holds for all, and what is refused

OBJECTIVES = [
    *(TokenClipObjective(aggregation=mode) for mode in AGGREGATIONS),  # type: ignore[arg-type]
    ImportanceWeightedObjective(),
    ImportanceWeightedObjective(level="sequence"),
    SequenceClipObjective(),
    SequenceClipObjective(normalize="none"),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_has_the_type_of_the_log_probabilities(objective: Objective, dtype: torch.dtype):
    # the module counts in float64, lest a sum of ones ends at 2^24
    ones = torch.ones(2, 3, dtype=dtype)
    loss, stats = objective(-ones, -ones, ones[:, 0], ones, tensor(2.0)[0])
    assert {loss.dtype, *(value.dtype for value in stats.values())} == {dtype}
    for value_loss in (BinaryCrossEntropy(), ClippedSquaredError()):
        assert value_loss(ones[0], ones[0], ones[0], tensor(2.0)[0]).dtype == dtype


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_without_a_verdict_reach_neither_loss_nor_gradient(objective: Objective):
    # their mask is zero, and their advantage anything
    log_probs = torch.full((2, 2), -1.0).double().requires_grad_()
    old, mask = tensor([-1.25, -0.75], [math.nan, math.inf]), tensor([1.0, 1.0], [0.0, 0.0])
    loss, _ = objective(log_probs, old, tensor(1.0, math.nan), mask, tensor(1.0)[0])
    loss.backward()
    alone = log_probs.detach()[:1].requires_grad_()
    expected, _ = objective(alone, old[:1], tensor(1.0), mask[:1], tensor(1.0)[0])
    expected.backward()
    assert expected.item() != 0
    assert torch.equal(loss, expected)
    assert torch.equal(log_probs.grad, torch.cat([alone.grad, torch.zeros(1, 2)]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: TokenClipObjective(clip_low=1.5),
            "`clip_low`=1.5 and `clip_high`=0.2 are no range around the ratio 1; use 0 to 1 for the lower and 0 or "
            "more for the upper.",
        ),
        (
            lambda: SequenceClipObjective(clip_high=-0.1),
            "`clip_low`=0.2 and `clip_high`=-0.1 are no range around the ratio 1; use 0 to 1 for the lower and 0 or "
            "more for the upper.",
        ),
        (
            lambda: TokenClipObjective(dual_clip=1.0),
            "`dual_clip`=1.0 is not above 1; use 3.0, or .inf for no bound.",
        ),
        (
            lambda: TokenClipObjective(constant_length=100),
            "`constant_length`=100 with `aggregation`=token-mean cannot be used; it must be 1 or more tokens and go "
            "with seq-mean-token-sum.",
        ),
        (
            lambda: ImportanceWeightedObjective(aggregation="seq-mean-token-sum", constant_length=0),
            "`constant_length`=0 with `aggregation`=seq-mean-token-sum cannot be used; it must be 1 or more tokens "
            "and go with seq-mean-token-sum.",
        ),
        (
            lambda: ImportanceWeightedObjective(min_weight=-0.5),
            "`min_weight`=-0.5 and `max_weight`=1.2 are no range around the weight 1; use 0 to 1 for the lower and "
            "1 or more for the upper.",
        ),
        (
            lambda: ImportanceWeightedObjective(0.5, 0.75),
            "`min_weight`=0.5 and `max_weight`=0.75 are no range around the weight 1; use 0 to 1 for the lower and "
            "1 or more for the upper.",
        ),
        (
            lambda: TokenClipObjective(aggregation="mean"),  # type: ignore[arg-type]
            "`aggregation`=mean is unknown; use token-mean or seq-mean-token-sum or seq-mean-token-mean.",
        ),
        (
            lambda: ImportanceWeightedObjective(level="word"),  # type: ignore[arg-type]
            "`level`=word is unknown; use token or sequence.",
        ),
        (
            lambda: SequenceClipObjective(normalize="joint"),  # type: ignore[arg-type]
            "`normalize`=joint is unknown; use length or none.",
        ),
        (
            lambda: SequenceClipObjective(against="refernce"),  # type: ignore[arg-type]
            "`against`=refernce is unknown; use behaviour or reference.",
        ),
        (
            lambda: ClippedSquaredError(0.0),
            "`ClippedSquaredError.clip`=0.0 leaves no room to learn; use 0.5, or .inf for no clip.",
        ),
    ],
)
def test_settings_that_cannot_be_used(make: Any, sentence: str):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value) == sentence
