import math

import pytest
import torch
from torch import Tensor

from sppo_lightning import functional as math_of

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def tensor(*values, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def logs(*ratios) -> Tensor:
    return tensor(*ratios).log()


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- advantages and critic


def test_sequence_advantage_by_hand():
    # sigmoid(ln 3) = 3/4
    assert_close(
        math_of.sequence_advantage(tensor(1.0, 0.0, 0.5), tensor(math.log(3), math.log(3), 0.0)),
        [0.25, -0.75, 0],
    )


def test_critic_loss_by_hand():
    # sigmoid(ln 3) = 3/4: −ln(3/4) for R = 1, −ln(1/4) for R = 0, their mean for R = 1/2
    logits, rewards = tensor(*[math.log(3)] * 3), tensor(1.0, 0.0, 0.5)
    hit, miss = -math.log(0.75), -math.log(0.25)
    assert_close(math_of.critic_loss(logits, rewards), (hit + miss + (hit + miss) / 2) / 3)
    assert_close(math_of.critic_loss(logits[:1], rewards[:1], denominator=3), hit / 3)
    assert_close(math_of.critic_loss(tensor(400.0), tensor(0.0)), 400.0)


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


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5: δ_1 = 1 − 2 = −1; δ_0 = 0 + 0.5·2 − 1 = 0; A_1 = −1; A_0 = 0 + 0.25·(−1)
    advantages, returns = math_of.gae(
        tensor([0.0, 1.0, math.nan]),
        tensor([1.0, 2.0, math.inf]),
        tensor([1.0, 1.0, 0.0]),
        0.5,
        0.5,
        whiten=False,
    )
    assert_close(advantages, [[-0.25, -1.0, 0.0]])
    assert_close(returns, [[0.75, 1.0, 0.0]])


def test_gae_steps_over_a_masked_position():
    advantages, returns = math_of.gae(
        tensor([0.0, 9.0, 1.0]), tensor([1.0, 9.0, 2.0]), tensor([1.0, 0.0, 1.0]), 0.5, 0.5, whiten=False
    )
    assert_close(advantages, [[-0.25, 0.0, -1.0]])
    assert_close(returns, [[0.75, 0.0, 1.0]])


def test_whitened_gae_has_mean_0_and_unbiased_variance_1():
    # values 0 make the advantages 3, 2 | 1: mean 2, unbiased variance 1
    advantages, returns = math_of.gae(
        tensor([1.0, 2.0], [1.0, 0.0]), torch.zeros(2, 2).double(), tensor([1.0, 1.0], [1.0, 0.0])
    )
    assert_close(advantages, [[1.0, 0.0], [-1.0, 0.0]], 1e-7)
    assert_close(returns, [[3.0, 2.0], [1.0, 0.0]])


@pytest.mark.parametrize("mask", [[[1.0, 0.0]], [[0.0, 0.0]]])
def test_whitened_gae_of_fewer_than_two_tokens_is_zero(mask):
    advantages, _ = math_of.gae(tensor([5.0, 5.0]), tensor([1.0, 1.0]), torch.tensor(mask))
    assert_close(advantages, [[0.0, 0.0]])


def test_gae_of_nothing():
    assert math_of.gae(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0))[0].numel() == 0


def test_group_advantage_by_hand_for_interleaved_groups():
    # group 7: 0, 1, 2: mean 1, std 1; group 3: 1, 5: mean 3, std √8
    rewards, groups = tensor(0.0, 1.0, 1.0, 5.0, 2.0), torch.tensor([7, 3, 7, 3, 7])
    root = math.sqrt(8)
    assert_close(math_of.group_advantage(rewards, groups, eps=0.0), [-1.0, -2 / root, 0.0, 2 / root, 1.0])
    assert_close(math_of.group_advantage(rewards, groups, eps=1.0)[[0, 4]], [-0.5, 0.5])
    assert_close(math_of.group_advantage(rewards, groups, scale_by_std=False), [-1.0, -2.0, 0.0, 2.0, 1.0])


def test_group_of_equal_rewards_has_no_advantage_in_float32():
    rewards = torch.full((7,), 0.1)
    assert math_of.group_advantage(rewards, torch.zeros(7, dtype=torch.long)).abs().max().item() == 0.0


def test_leave_one_out_advantage_by_hand():
    # 0 − (1 + 5)/2, 1 − (0 + 5)/2, 5 − (0 + 1)/2
    assert_close(math_of.leave_one_out_advantage(tensor(0.0, 1.0, 5.0), torch.tensor([2, 2, 2])), [-3.0, -1.5, 4.5])


@pytest.mark.parametrize("function", [math_of.group_advantage, math_of.leave_one_out_advantage])
def test_group_of_one_is_an_error(function):
    with pytest.raises(ValueError, match="one sample") as error:
        function(torch.zeros(3), torch.tensor([4, 9, 4]))
    assert str(error.value) == (
        "`groups` has one sample in group 9, which leaves no baseline; sample at least 2 responses per prompt."
    )


def test_greedy_baseline_advantage_by_hand():
    assert_close(math_of.greedy_baseline_advantage(tensor(1.0, 0.0), tensor(0.25, 1.0)), [0.75, -1.0])


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


# ---------------------------------------------------------------- KL and aggregation


def test_kl_penalty_by_hand():
    logp, reference = tensor([math.log(2), -math.log(2), 100.0, -100.0]), torch.zeros(1, 4).double()
    ln2 = math.log(2)
    assert_close(math_of.kl_penalty(logp, reference, "k1"), [[ln2, -ln2, 20.0, -20.0]])
    assert_close(math_of.kl_penalty(logp, reference, "k2"), [[ln2**2 / 2, ln2**2 / 2, 200.0, 200.0]])
    assert_close(math_of.kl_penalty(logp, reference, "k3"), [[ln2 - 0.5, 1 - ln2, 10.0, 10.0]])


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
    ],
)
def test_unknown_options_are_named(call, sentence):
    with pytest.raises(ValueError, match="is unknown") as error:
        call()
    assert str(error.value) == sentence
