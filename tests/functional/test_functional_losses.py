import math

import pytest
import torch
from vectors import AGGREGATIONS, assert_close, tensor

from sppo_lightning import functional as math_of

# ---------------------------------------------------------------- the critic's losses


def test_critic_loss_by_hand():
    # sigmoid(ln 3) = 3/4: −ln(3/4) for R = 1, −ln(1/4) for R = 0, their mean for R = 1/2
    logits, rewards = tensor(*[math.log(3)] * 3), tensor(1.0, 0.0, 0.5)
    hit, miss = -math.log(0.75), -math.log(0.25)
    assert_close(math_of.critic_loss(logits, rewards), (hit + miss + (hit + miss) / 2) / 3)
    assert_close(math_of.critic_loss(logits[:1], rewards[:1], denominator=3), hit / 3)
    assert_close(math_of.critic_loss(tensor(400.0), tensor(0.0)), 400.0)


def test_the_critics_gradient_is_v_minus_r():
    logits = tensor(math.log(3), math.log(3), -math.log(3)).requires_grad_()
    math_of.critic_loss(logits, tensor(1.0, 0.0, 0.5), denominator=2).backward()
    assert_close(logits.grad, [(0.75 - 1) / 2, 0.75 / 2, (0.25 - 0.5) / 2])


def test_critic_loss_of_no_sequences_is_zero_with_a_gradient():
    logits = torch.zeros(0, requires_grad=True)
    loss = math_of.critic_loss(logits, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


@pytest.mark.parametrize(("bad", "said"), [(1.5, "1.5"), (-0.25, "-0.25"), (math.nan, "nan")])
def test_critic_loss_names_the_first_bad_target(bad, said):
    with pytest.raises(ValueError, match=r"`rewards`\[1\]=") as error:
        math_of.critic_loss(torch.zeros(4), torch.tensor([1.0, bad, 0.0, 7.0]))
    assert str(error.value) == f"`rewards`[1]={said} is outside [0, 1]; rescale the rewards."


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "grad"),
    [
        # clip 0.5
        (0.25, 0.0, 1.0, 0.28125, -0.75),  # within the range: (V − G)² / 2
        (0.75, 0.0, 1.0, 0.125, 0.0),  # above it and on the way to the target: (0.5 − 1)² / 2
        (0.75, 0.0, -1.0, 1.53125, 1.75),  # above it, and the target below: the unclipped side is the worse
        (-0.75, 0.0, -1.0, 0.125, 0.0),  # below it and on the way
        (-0.75, 0.0, 1.0, 1.53125, -1.75),  # below it, and the target above
        (2.0, 1.75, 1.5, 0.125, 0.5),  # the range moves with the old value
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, grad):
    values = tensor([value]).requires_grad_()
    losses = math_of.clipped_value_loss(values, tensor([old]), tensor([target]), tensor([1.0]))
    losses.sum().backward()
    assert_close(losses.detach(), [[loss]])
    assert_close(values.grad, [[grad]])


def test_how_far_a_value_may_move():
    values, old, target = tensor([0.75, -3.0]), tensor([0.0, 0.0]), tensor([1.0, -4.0])
    for clip, expected in ((0.25, [0.28125, 7.03125]), (1.0, [0.03125, 4.5]), (math.inf, [0.03125, 0.5])):
        assert_close(math_of.clipped_value_loss(values, old, target, torch.ones(1, 2), clip), [expected])


# ---------------------------------------------------------------- KL and aggregation


def test_kl_penalty_by_hand():
    logp, reference = tensor([math.log(2), -math.log(2), 100.0, -100.0]), torch.zeros(1, 4).double()
    ln2 = math.log(2)
    assert_close(math_of.kl_penalty(logp, reference, "k1"), [[ln2, -ln2, 20.0, -20.0]])
    assert_close(math_of.kl_penalty(logp, reference, "k2"), [[ln2**2 / 2, ln2**2 / 2, 200.0, 200.0]])
    assert_close(math_of.kl_penalty(logp, reference, "k3"), [[ln2 - 0.5, 1 - ln2, 10.0, 10.0]])


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [("k1", [1, 1, 0]), ("k2", [math.log(2), -math.log(2), 0]), ("k3", [0.5, -1, 0])],
)
def test_the_gradient_of_a_kl_penalty_ends_where_it_is_clamped(estimator, gradient):
    logp = tensor([math.log(2), -math.log(2), 100.0]).requires_grad_()
    math_of.kl_penalty(logp, torch.zeros(1, 3).double(), estimator).sum().backward()
    assert_close(logp.grad, [gradient])


LOSSES = [[1.0, 2.0, 3.0], [10.0, 7.0, 7.0], [7.0, 7.0, 7.0]]
MASK = [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # the last row is no sequence


@pytest.mark.parametrize(("mode", "loss"), zip(AGGREGATIONS, (16 / 4, (6 + 10) / 2, (2 + 10) / 2), strict=True))
def test_aggregate_by_hand(mode, loss):
    assert_close(math_of.aggregate(tensor(*LOSSES), tensor(*MASK), mode), loss, 2e-8)
    assert_close(math_of.aggregate(tensor(*LOSSES), tensor(*MASK), mode, denominator=torch.tensor(8)),
                 loss * (4 if mode == "token-mean" else 2) / 8, 2e-8)  # fmt: skip


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 0, torch.tensor(0.0)])
def test_aggregate_of_an_empty_mask_is_zero_with_finite_gradients(mode, denominator):
    losses = torch.full((2, 3), math.nan, requires_grad=True)
    loss = math_of.aggregate(losses, torch.zeros(2, 3), mode, denominator)
    loss.backward()
    assert loss.item() == 0
    assert losses.grad.abs().max().item() == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: math_of.aggregate(torch.zeros(1, 1), torch.ones(1, 1), "mean"),
            "`mode`='mean' is unknown; use one of 'token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean'.",
        ),
        (
            lambda: math_of.kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4"),
            "`estimator`='k4' is unknown; use one of 'k1', 'k2', 'k3'.",
        ),
        (
            lambda: math_of.sequence_clip_objective(
                torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1), normalize="joint"
            ),
            "`normalize`='joint' is unknown; use one of 'length', 'none'.",
        ),
        (
            lambda: math_of.importance_weighted_objective(*[torch.zeros(1, 1)] * 4, level="word"),
            "`level`='word' is unknown; use one of 'token', 'sequence'.",
        ),
    ],
)
def test_unknown_options_are_named(call, sentence):
    with pytest.raises(ValueError, match="is unknown") as error:
        call()
    assert str(error.value) == sentence
