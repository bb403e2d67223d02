import math

import pytest
import torch
from vectors import assert_close, logs, tensor

from sppo_lightning import functional as math_of

# ---------------------------------------------------------------- clipped objectives

# ratio, advantage, loss, gradient with respect to logp; clip 0.2, dual clip 3
CLIP_CASES = [
    (1.1, 1.0, -1.1, -1.1),
    (1.5, 1.0, -1.2, 0.0),  # clipped above
    (0.5, 1.0, -0.5, -0.5),  # below, but the unclipped side is the worse
    (0.9, -1.0, 0.9, 0.9),
    (0.5, -1.0, 0.8, 0.0),  # clipped below
    (1.5, -1.0, 1.5, 1.5),  # above, but the unclipped side is the worse
]
DUAL_CLIP_CASES = [(4.0, -1.0, 3.0, 0.0), (2.9, -2.0, 5.8, 5.8), (4.0, 1.0, -1.2, 0.0)]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "grad"), CLIP_CASES + DUAL_CLIP_CASES)
def test_token_clip_by_hand(ratio, advantage, loss, grad):
    logp = logs([ratio]).requires_grad_()
    losses, _ = math_of.token_clip_objective(logp, logs([1.0]), tensor([advantage]), tensor([1.0]))
    losses.sum().backward()
    assert_close(losses.detach(), [[loss]])
    assert_close(logp.grad, [[grad]])


def test_token_clip_range_has_two_sides():
    ratios, advantages = logs([1.25, 0.6, 0.6]), tensor([1.0, -1.0, 1.0])
    losses, _ = math_of.token_clip_objective(ratios, torch.zeros(1, 3), advantages, torch.ones(1, 3), 0.3, 0.28)
    assert_close(losses, [[-1.25, 0.7, -0.6]])


def test_token_clip_takes_one_advantage_per_sequence():
    logp = logs([1.1, 0.9], [1.1, 0.9])
    losses, _ = math_of.token_clip_objective(logp, torch.zeros(2, 2), tensor([1.0], [-1.0]), torch.ones(2, 2))
    assert_close(losses, [[-1.1, -0.9], [1.1, 0.9]])


def test_token_clip_stats_by_hand():
    # clipped: the first two of four tokens; bounded by the dual clip: the third
    logp, advantages = logs([1.5, 0.5, 4.0], [1.0, 1.0, 7.0]), tensor([1.0, -1.0, -1.0], [1.0, 1.0, 1.0])
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    _, stats = math_of.token_clip_objective(logp.requires_grad_(), torch.zeros(2, 3), advantages, mask)
    expected = {"clip_fraction": 0.5, "dual_clip_fraction": 0.25, "approx_kl": -math.log(3) / 4}
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert not stats[key].requires_grad
        assert_close(stats[key], value, 1e-8)


def test_log_ratio_is_clamped():
    far = tensor([1000.0, -1000.0])
    losses, stats = math_of.token_clip_objective(
        far, torch.zeros(1, 2), tensor([-1.0, 1.0]), torch.ones(1, 2), dual_clip=math.inf
    )
    assert_close(losses, [[math.exp(20), -math.exp(-20)]])
    assert_close(stats["approx_kl"], 0.0)
    losses, _ = math_of.sequence_clip_objective(
        far[:, :1], torch.zeros(1, 1), tensor(-1.0), torch.ones(1, 1), normalize="none"
    )
    assert_close(losses, [math.exp(20)])


def test_dual_clip_at_or_below_one_is_an_error():
    with pytest.raises(ValueError, match="dual_clip") as error:
        math_of.token_clip_objective(*[torch.zeros(1, 1)] * 4, dual_clip=1.0)
    assert str(error.value) == "`dual_clip`=1.0 is not above 1; use 3.0, or math.inf for no bound."


@pytest.mark.parametrize(("ratio", "advantage", "loss", "grad"), CLIP_CASES)
@pytest.mark.parametrize("normalize", ["none", "length"])
def test_sequence_clip_by_hand(ratio, advantage, loss, grad, normalize):
    # Two tokens whose ratios multiply to `ratio`, or whose geometric mean it is; a third is masked.
    tokens = [ratio / 2, 2.0] if normalize == "none" else [ratio * 2, ratio / 2]
    logp = logs([*tokens, 5.0]).requires_grad_()
    losses, _ = math_of.sequence_clip_objective(
        logp, logs([1.0, 1.0, 1.0]), tensor(advantage), tensor([1.0, 1.0, 0.0]), normalize=normalize
    )
    losses.sum().backward()
    per_token = grad if normalize == "none" else grad / 2
    assert_close(losses.detach(), [loss])
    assert_close(logp.grad, [[per_token, per_token, 0.0]])


def test_sequence_clip_stats_by_hand():
    # the first sequence (three tokens) is clipped, the second (one token) is not
    logp, mask = logs([1.5, 1.0, 1.0], [1.1, 9.0, 9.0]), tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    _, stats = math_of.sequence_clip_objective(
        logp.requires_grad_(), torch.zeros(2, 3), tensor(1.0, 1.0), mask, normalize="none"
    )
    expected = {"clip_fraction": 0.75, "approx_kl": -(math.log(1.5) + math.log(1.1)) / 4}
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert not stats[key].requires_grad
        assert_close(stats[key], value, 1e-8)


# ---------------------------------------------------------------- importance weights

# ratio, advantage, weight; truncated to 0.5 … 1.5
WEIGHT_CASES = [
    (1.25, 2.0, 1.25),
    (4.0, 2.0, 1.5),
    (0.25, 2.0, 0.5),
    (0.75, -2.0, 0.75),
    (4.0, -2.0, 1.5),
    (0.25, -2.0, 0.5),
]


@pytest.mark.parametrize(("ratio", "advantage", "weight"), WEIGHT_CASES)
def test_the_importance_weight_is_a_constant_by_hand(ratio, advantage, weight):
    # log π = ln ratio − 2: the loss is −w A log π, and its gradient −w A, where the weight is truncated too
    logp = (logs([ratio]) - 2).requires_grad_()
    losses, _ = math_of.importance_weighted_objective(
        logp, tensor([-2.0]), tensor([advantage]), tensor([1.0]), 0.5, 1.5
    )
    losses.sum().backward()
    assert_close(losses.detach(), [[-weight * advantage * (math.log(ratio) - 2)]])
    assert_close(logp.grad, [[-weight * advantage]])


@pytest.mark.parametrize(("ratio", "advantage", "weight"), WEIGHT_CASES)
def test_the_joint_importance_weight_by_hand(ratio, advantage, weight):
    # Two tokens whose ratios multiply to `ratio`; both bear its weight, and the third is masked.
    logp = (logs([ratio / 8, 8.0, 7.0]) - 2).requires_grad_()
    losses, _ = math_of.importance_weighted_objective(
        logp, torch.full((1, 3), -2.0), tensor([advantage]), tensor([1.0, 1.0, 0.0]), 0.5, 1.5, "sequence"
    )
    losses.sum().backward()
    first, second = math.log(ratio / 8) - 2, math.log(8) - 2
    assert_close(losses.detach(), [[-weight * advantage * first, -weight * advantage * second, 0.0]])
    assert_close(logp.grad, [[-weight * advantage, -weight * advantage, 0.0]])


def test_token_weights_are_cispo_written_out():
    # MiniMax-M1's equation 4: −1/Σ|o_i| Σ_i Σ_t sg(clip(r, 1 − ε_low, 1 + ε_high)) Â_i log π
    policy, behaviour = [[0.5, 0.3, 0.9], [0.2, 0.6, 0.1]], [[0.4, 0.6, 0.5], [0.25, 0.2, 0.8]]
    advantages, lengths, low, high = (1.5, -0.5), (3, 2), 0.3, 0.25
    expected, tokens = 0.0, sum(lengths)
    for i, length in enumerate(lengths):
        for t in range(length):
            weight = min(max(policy[i][t] / behaviour[i][t], 1 - low), 1 + high)
            expected -= weight * advantages[i] * math.log(policy[i][t]) / tokens
    mask = tensor([1.0, 1.0, 1.0], [1.0, 1.0, 0.0])
    losses, _ = math_of.importance_weighted_objective(
        logs(*policy), logs(*behaviour), tensor([1.5], [-0.5]), mask, 1 - low, 1 + high
    )
    assert_close(math_of.aggregate(losses, mask, "token-mean"), expected, 1e-8)


def test_each_token_may_have_its_own_advantage():
    losses, _ = math_of.importance_weighted_objective(
        tensor([-1.0, -2.0]), tensor([-1.0, -2.0]), tensor([3.0, -4.0]), torch.ones(1, 2)
    )
    assert_close(losses, [[3.0, -8.0]])


def test_weights_are_truncated_from_above_alone_unless_asked():
    logp, ones = logs([100.0, 0.01]), torch.ones(1, 2)
    losses, stats = math_of.importance_weighted_objective(logp, torch.zeros(1, 2), tensor([1.0, 1.0]), ones)
    assert_close(losses, [[-1.2 * math.log(100), 0.01 * math.log(100)]])
    assert_close(stats["clip_fraction"], 0.5, 1e-8)


def test_importance_weighted_stats_by_hand():
    # token weights 1.5 (of 3), 1, 0.5 (of 0.25) and 0.75; joint ones 0.75 three times, and 0.75
    logp, mask = logs([3.0, 1.0, 0.25], [0.75, 9.0, 9.0]), tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    kl = -(math.log(0.75) + math.log(0.75)) / 4
    for level, fraction, mean in (("token", 0.5, 3.75 / 4), ("sequence", 0.0, 0.75)):
        _, stats = math_of.importance_weighted_objective(
            logp.clone().requires_grad_(), torch.zeros(2, 3), tensor([1.0], [-1.0]), mask, 0.5, 1.5, level
        )
        expected = {"clip_fraction": fraction, "weight_mean": mean, "approx_kl": kl}
        assert stats.keys() == expected.keys()
        for key, value in expected.items():
            assert not stats[key].requires_grad
            assert_close(stats[key], value, 1e-8)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_log_weights_are_clamped(level):
    logp = tensor([900.0, 100.0], [-900.0, -100.0])
    losses, _ = math_of.importance_weighted_objective(
        logp, torch.zeros(2, 2), tensor([1.0], [1.0]), torch.ones(2, 2), 0.0, math.inf, level
    )
    assert_close((-losses / logp).log(), [[20.0, 20.0], [-20.0, -20.0]])
