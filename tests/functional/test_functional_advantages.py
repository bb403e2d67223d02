import math

import pytest
import torch
from vectors import assert_close, on_ranks, tensor

from sppo_lightning import functional as math_of


def test_sequence_advantage_by_hand():
    # sigmoid(ln 3) = 3/4
    assert_close(
        math_of.sequence_advantage(tensor(1.0, 0.0, 0.5), tensor(math.log(3), math.log(3), 0.0)),
        [0.25, -0.75, 0],
    )


def test_pooled_advantage_by_hand():
    # k = 3; group 1: V = 1/2 and 1, 0, 1; group 0: V = 1/4 and one response; group 4: one of two is judged
    advantages = math_of.pooled_advantage(
        tensor(1.0, 0.25, 0.0, 1.0, 0.75, 0.0),
        tensor(0.5, 0.25, 0.5, 0.5, 0.125, 0.125),
        torch.tensor([1, 0, 1, 1, 4, 4]),
        torch.tensor([True, True, True, True, True, False]),
        3.0,
    )
    # 1 − (1.5 + 1) / 5, twice; 0 − (1.5 + 2) / 5
    assert_close(advantages[:5], [0.5, 0.0, -0.7, 0.5, 0.625])
    assert advantages.dtype == torch.float64
    empty = torch.zeros(0)
    assert math_of.pooled_advantage(empty, empty, empty.long(), empty.bool(), 3.0).tolist() == []


# ---------------------------------------------------------------- GAE


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


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        # values 0.5, 0.25, 0.75 and rewards −0.1, 0.2, 1
        (1.0, 1.0, [1.1 - 0.5, 1.2 - 0.25, 1 - 0.75]),  # the rewards to come, minus the value
        (0.5, 1.0, [-0.1 + 0.1 + 0.25 - 0.5, 0.2 + 0.5 - 0.25, 0.25]),
        (0.5, 0.0, [-0.1 + 0.125 - 0.5, 0.2 + 0.375 - 0.25, 0.25]),  # δ alone
        # δ = −0.3525, 0.6925, 0.25; γλ = 0.792
        (0.99, 0.8, [-0.3525 + 0.792 * (0.6925 + 0.792 * 0.25), 0.6925 + 0.792 * 0.25, 0.25]),
    ],
)
def test_gae_discounts_by_hand(gamma, lam, expected):
    values, mask = tensor([0.5, 0.25, 0.75]), torch.ones(1, 3)
    advantages, returns = math_of.gae(tensor([-0.1, 0.2, 1.0]), values, mask, gamma, lam, whiten=False)
    assert_close(advantages, [expected])
    assert_close(returns, tensor(expected) + values)


def test_gae_steps_over_a_masked_position():
    advantages, returns = math_of.gae(
        tensor([0.0, 9.0, 1.0]), tensor([1.0, 9.0, 2.0]), tensor([1.0, 0.0, 1.0]), 0.5, 0.5, whiten=False
    )
    assert_close(advantages, [[-0.25, 0.0, -1.0]])
    assert_close(returns, [[0.75, 0.0, 1.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.999, 0.95), (1.0, 0.3), (1.0, 0.0)])
def test_float32_returns_of_chances_stay_chances(gamma, lam):
    # The critic's targets: what rounding pushes past 0 or 1 is no target of a cross-entropy.
    values = (4 * torch.randn(64, 300)).sigmoid()
    values[::5] = values[::5].round()
    solved, mask = torch.tensor([0.0, 1.0]).repeat(32), torch.ones(64, 300)
    _, returns = math_of.gae(math_of.last_token_rewards(solved, mask), values, mask, gamma, lam, whiten=False)
    assert returns.min().item() >= 0.0
    assert returns.max().item() <= 1.0
    if lam == 1 and gamma == 1:
        assert torch.equal(returns, solved[:, None].expand(64, 300))


def test_whitened_gae_has_mean_0_and_unbiased_variance_1():
    # values 0 make the advantages 3, 2 | 1: mean 2, unbiased variance 1
    advantages, returns = math_of.gae(
        tensor([1.0, 2.0], [1.0, 0.0]), torch.zeros(2, 2).double(), tensor([1.0, 1.0], [1.0, 0.0])
    )
    assert_close(advantages, [[1.0, 0.0], [-1.0, 0.0]], 1e-7)
    assert_close(returns, [[3.0, 2.0], [1.0, 0.0]])


def test_gae_of_nothing():
    assert math_of.gae(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0))[0].numel() == 0


def test_rewards_and_values_of_two_types_meet_in_the_wider():
    advantages, returns = math_of.gae(tensor([1.0]), torch.tensor([[0.25]]), torch.ones(1, 1), whiten=False)
    assert (advantages.dtype, returns.dtype) == (torch.float64, torch.float64)
    assert (advantages.item(), returns.item()) == (0.75, 1.0)


# ---------------------------------------------------------------- what GAE is made of


def test_whitening_by_hand():
    # 0, 2, 4, 6: mean 3, squares 9 + 1 + 1 + 9, unbiased variance 20/3
    values, mask = tensor([0.0, math.nan, 2.0], [4.0, 6.0, math.inf]), tensor([1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    std = math.sqrt(20 / 3)
    assert_close(math_of.whiten_tokens(values, mask), [[-3 / std, 0.0, -1 / std], [1 / std, 3 / std, 0.0]], 1e-8)


@pytest.mark.parametrize("mask", [[[1.0, 0.0]], [[0.0, 0.0]]])
def test_fewer_than_two_tokens_are_whitened_to_zero(mask):
    assert_close(math_of.whiten_tokens(tensor([5.0, 5.0]), torch.tensor(mask)), [[0.0, 0.0]])
    assert_close(math_of.gae(tensor([5.0, 5.0]), tensor([1.0, 1.0]), torch.tensor(mask))[0], [[0.0, 0.0]])


def test_equal_tokens_are_whitened_to_zero():
    assert math_of.whiten_tokens(torch.full((3, 4), 0.5), torch.ones(3, 4)).abs().max().item() == 0.0


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_ranks_whiten_as_one(cut):
    # Rank 0 holds the first `cut` rows; none of them, one token, or all.
    values = torch.randn(4, 3, dtype=torch.float64)
    mask = tensor([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    parts = on_ranks(
        lambda total: math_of.whiten_tokens(values[:cut], mask[:cut], total),
        lambda total: math_of.whiten_tokens(values[cut:], mask[cut:], total),
    )
    kept = values[mask > 0]
    by_itself = torch.where(mask > 0, (values - kept.mean()) / torch.sqrt(kept.var() + 1e-8), 0.0)
    assert_close(torch.cat(parts), by_itself, 1e-8)
    assert_close(torch.cat(parts), math_of.whiten_tokens(values, mask), 1e-14)


def test_the_reward_stands_at_the_last_token():
    mask = tensor([1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    rewards = tensor(0.5, 1.0, -2.0, math.nan)
    placed = [[0.0, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]]
    assert_close(math_of.last_token_rewards(rewards, mask), placed)
    # penalties count at every token and, where there is none, not
    penalties = tensor([0.1, 0.2, math.nan], [0.0, -0.25, 0.5], [1.0, math.inf, 2.0], [math.nan] * 3)
    assert_close(
        math_of.last_token_rewards(rewards, mask, penalties),
        [[-0.1, 0.3, 0.0], [0.0, 0.25, 0.5], [-1.0, 0.0, -4.0], [0.0, 0.0, 0.0]],
    )


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_the_reward_keeps_its_type_whatever_the_mask_has(mask_dtype):
    placed = math_of.last_token_rewards(tensor(0.1), torch.tensor([[1, 1, 0]]).to(mask_dtype))
    assert placed.dtype == torch.float64
    assert placed.tolist() == [[0.0, 0.1, 0.0]]


def test_rewards_of_no_tokens():
    assert math_of.last_token_rewards(torch.zeros(0), torch.zeros(0, 0)).shape == (0, 0)
    assert math_of.last_token_rewards(torch.ones(2), torch.zeros(2, 0)).shape == (2, 0)


def test_blend_by_hand():
    sequence, tokens = tensor(4.0, math.nan), tensor([1.0, -2.0, math.nan], [math.inf] * 3)
    mask = tensor([1.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    nothing = [0.0, 0.0, 0.0]
    assert_close(math_of.blend_advantages(sequence, tokens, mask, 0.25), [[1.75, -0.5, 0.0], nothing])
    assert_close(math_of.blend_advantages(sequence, tokens, mask, 1.0), [[4.0, 4.0, 0.0], nothing])
    assert_close(math_of.blend_advantages(sequence, tokens, mask, 0.0), [[1.0, -2.0, 0.0], nothing])


# ---------------------------------------------------------------- other responses as the baseline


def test_group_advantage_by_hand_for_interleaved_groups():
    # group 7: 0, 1, 2: mean 1, std 1; group 3: 1, 5: mean 3, std √8
    rewards, groups = tensor(0.0, 1.0, 1.0, 5.0, 2.0), torch.tensor([7, 3, 7, 3, 7])
    root = math.sqrt(8)
    assert_close(math_of.group_advantage(rewards, groups, eps=0.0), [-1.0, -2 / root, 0.0, 2 / root, 1.0])
    assert_close(math_of.group_advantage(rewards, groups, eps=1.0)[[0, 4]], [-0.5, 0.5])
    assert_close(math_of.group_advantage(rewards, groups, scale_by_std=False), [-1.0, -2.0, 0.0, 2.0, 1.0])


def test_group_of_equal_rewards_has_no_advantage_in_float32():
    rewards, groups = torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long)
    assert math_of.group_advantage(rewards, groups).abs().max().item() == 0.0
    assert math_of.leave_one_out_advantage(rewards, groups).abs().max().item() == 0.0


def test_leave_one_out_advantage_by_hand():
    # 0 − (1 + 5)/2, 1 − (0 + 5)/2, 5 − (0 + 1)/2; and 2 − 3, 3 − 2
    rewards, groups = tensor(0.0, 2.0, 1.0, 5.0, 3.0), torch.tensor([2, 0, 2, 2, 0])
    assert_close(math_of.leave_one_out_advantage(rewards, groups), [-3.0, -1.0, -1.5, 4.5, 1.0])


@pytest.mark.parametrize("function", [math_of.group_advantage, math_of.leave_one_out_advantage])
def test_group_of_one_is_an_error(function):
    with pytest.raises(ValueError, match="one sample") as error:
        function(torch.zeros(3), torch.tensor([4, 9, 4]))
    assert str(error.value) == (
        "`groups` has one sample in group 9, which leaves no baseline; sample at least 2 responses per prompt."
    )
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []  # no group, no error


def test_greedy_baseline_advantage_by_hand():
    assert_close(math_of.greedy_baseline_advantage(tensor(1.0, 0.0), tensor(0.25, 1.0)), [0.75, -1.0])
