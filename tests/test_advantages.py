import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from vectors import assert_close, on_ranks, tensor

from sppo_lightning.advantages import (
    GAE,
    BatchMeanAdvantage,
    GreedyBaselineAdvantage,
    GroupAdvantage,
    HybridAdvantage,
    LeaveOneOutAdvantage,
    SequenceAdvantage,
)
from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Outcomes
from sppo_lightning.objectives import BinaryCrossEntropy

SETTINGS = [(1.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 0.0)]


def outcomes(
    rewards: Sequence[float | None],
    lengths: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    **more: Any,
) -> Outcomes:
    """Responses of `lengths` tokens, one each unless said; a reward of None is no verdict."""
    rows = len(rewards)
    lengths = lengths or [1] * rows
    width = max(lengths, default=0)
    rollouts = Rollouts(
        prompts=[Prompt("a", "1", "sums", 0)] * rows,
        prompt_index=torch.tensor(groups or range(rows), dtype=torch.long),
        prompt_ids=torch.full((rows, 1), 7),
        prompt_mask=torch.ones(rows, 1),
        response_ids=torch.full((rows, width), 3),
        response_mask=(torch.arange(width) < torch.tensor(lengths)[:, None]).double(),
        sampled_log_probs=torch.zeros(rows, width),
        responses=["x"] * rows,
        finish_reasons=["stop"] * rows,
        temperature=1.0,
        policy_versions=torch.zeros(rows, dtype=torch.long),
    )
    return Outcomes(
        rollouts,
        rewards=tensor(*(0.0 if reward is None else reward for reward in rewards)),
        verdicts=torch.tensor([reward is not None for reward in rewards], dtype=torch.bool),
        **more,
    )


# ---------------------------------------------------------------- one advantage per response


def test_sequence_advantage_is_r_minus_v():
    # sigmoid(ln 3) = 3/4
    made = outcomes([1.0, 0.0, 0.5], value_logits=tensor(math.log(3), math.log(3), 0.0))
    assert_close(SequenceAdvantage()(made), [0.25, -0.75, 0.0])


def test_penalties_lower_the_advantage_and_not_the_target():
    # of the response's own tokens: the first response has one, the second two
    penalties = tensor([0.25, 9.0], [0.125, -0.5])
    made = outcomes([1.0, 0.0], [1, 2], value_logits=tensor(0.0, 0.0), penalties=penalties)
    assert_close(SequenceAdvantage()(made), [0.25, -0.125])
    assert_close(SequenceAdvantage().value_targets(made), [1.0, 0.0])
    assert_close(BatchMeanAdvantage()(made), [0.75 - 0.5625, 0.375 - 0.5625])


def test_the_batch_mean_is_of_the_rows_with_a_verdict():
    # (1 + 0.5 + 0) / 3
    made = outcomes([1.0, None, 0.5, 0.0], penalties=torch.tensor([[0.0], [7.0], [0.0], [0.0]]))
    assert_close(BatchMeanAdvantage()(made)[made.verdicts], [0.5, 0.0, -0.5])


def test_the_batch_mean_is_of_all_ranks():
    # (1 + 0 + 1 + 1) / 4; the last rank has no verdict
    shares: list[list[float | None]] = [[1.0, None, 0.0], [1.0, 1.0], [None]]
    made = on_ranks(
        *(lambda total, r=rewards: BatchMeanAdvantage()(outcomes(r, sum_over_ranks=total)) for rewards in shares)
    )
    assert_close(made[0][[0, 2]], [0.25, -0.75])
    assert_close(made[1], [0.25, 0.25])
    assert made[2].isfinite().all()


def test_a_batch_without_verdicts_has_a_finite_baseline():
    assert BatchMeanAdvantage()(outcomes([None, None])).tolist() == [0.0, 0.0]


# prompt 0: 1, 0, 0.5 and one without verdict; prompt 1: 1 and one without; prompt 2: 0.25 alone; prompt 3: 1, 1
GROUPED: tuple[list[float | None], list[int]] = (
    [1.0, 1.0, None, 0.25, 0.0, None, 1.0, 0.5, 1.0],
    [0, 1, 0, 2, 0, 1, 3, 0, 3],
)


def test_group_advantage_leaves_out_rows_without_a_verdict():
    # prompt 0: mean 0.5, unbiased std 0.5; fewer than two verdicts have no baseline
    made = outcomes(GROUPED[0], groups=GROUPED[1])
    assert_close(GroupAdvantage()(made), [1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0], 1e-5)
    assert_close(GroupAdvantage(scale_by_std=False)(made), [0.5, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.0])


def test_leave_one_out_advantage_leaves_out_rows_without_a_verdict():
    # prompt 0: 1 − 0.25, 0 − 0.75, 0.5 − 0.5
    made = outcomes(GROUPED[0], groups=GROUPED[1])
    assert_close(LeaveOneOutAdvantage()(made), [0.75, 0.0, 0.0, 0.0, -0.75, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("advantage", [GroupAdvantage(), GroupAdvantage(False), LeaveOneOutAdvantage()])
def test_groups_without_any_pair_of_verdicts(advantage: Any):
    assert advantage(outcomes([None, None, 1.0], groups=[0, 0, 1])).tolist() == [0.0, 0.0, 0.0]
    assert advantage(outcomes([])).tolist() == []


def test_penalties_enter_the_groups_baseline():
    # rewards 1 − 0.25 and 0 − 0.75; a penalty of a row without a verdict counts nowhere
    penalties = tensor([0.25], [0.75], [9.0])
    made = outcomes([1.0, 0.0, None], groups=[0, 0, 0], penalties=penalties)
    assert_close(LeaveOneOutAdvantage()(made), [1.5, -1.5, 0.0])
    assert_close(GroupAdvantage(scale_by_std=False)(made), [0.75, -0.75, 0.0])


def test_the_greedy_baseline_is_the_greedy_responses_reward():
    made = outcomes([1.0, 0.0, 1.0], greedy_rewards=tensor(0.25, 1.0, 1.0), penalties=tensor([0.5], [0.0], [0.0]))
    assert_close(GreedyBaselineAdvantage()(made), [0.25, -1.0, 0.0])
    assert_close(GreedyBaselineAdvantage().value_targets(made), [1.0, 0.0, 1.0])


# ---------------------------------------------------------------- one advantage per token


def token_outcomes(**more: Any) -> Outcomes:
    """R = 1 of two tokens, R = 0 of one, and two tokens without a verdict."""
    values = tensor([0.5, 0.25], [0.75, math.nan], [0.5, 0.5])
    penalties = tensor([0.1, 0.2], [0.3, 7.0], [5.0, 5.0])
    return outcomes([1.0, 0.0, None], [2, 1, 2], token_values=values, **{"penalties": penalties} | more)


@pytest.mark.parametrize(
    ("setting", "expected"),
    zip(
        SETTINGS,
        [
            # token rewards −0.1 and 1 − 0.2; −0.3
            [[0.7 - 0.5, 0.8 - 0.25], [-0.3 - 0.75, 0.0]],
            # −0.1 + 0.5 · (0.25 + 0.8) / 2 − 0.5
            [[-0.3375, 0.55], [-1.05, 0.0]],
            [[-0.1 + 0.4 - 0.5, 0.55], [-1.05, 0.0]],
            [[-0.1 + 0.25 - 0.5, 0.55], [-1.05, 0.0]],
        ],
        strict=True,
    ),
)
def test_gae_takes_the_penalties_off_token_by_token(setting: tuple[float, float], expected: list[list[float]]):
    assert_close(GAE(*setting, whiten=False)(token_outcomes()), [*expected, [0.0, 0.0]])


@pytest.mark.parametrize(
    ("setting", "first"),
    # the second token's target is R = 1; the first's γ ((1 − λ) 0.25 + λ · 1), without penalties
    zip(SETTINGS, [1.0, 0.3125, 0.5, 0.25], strict=True),
)
def test_the_token_critics_targets_are_lambda_returns_of_the_reward(setting: tuple[float, float], first: float):
    assert_close(GAE(*setting).value_targets(token_outcomes()), [[first, 1.0], [0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("setting", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9)])
def test_a_cross_entropy_accepts_the_targets_of_long_responses(setting: tuple[float, float]):
    logits = 3 * torch.randn(20, 400)
    made = outcomes([0.0, 1.0] * 10, [400] * 20, token_values=logits.sigmoid())
    made.rewards = made.rewards.float()
    targets = GAE(*setting).value_targets(made)
    assert targets.dtype == torch.float32
    loss = BinaryCrossEntropy()(logits.flatten(), logits.sigmoid().flatten(), targets.flatten(), tensor(8000.0)[0])
    log_odds, wanted = logits.double(), targets.double()
    by_hand = (torch.nn.functional.softplus(log_odds) - wanted * log_odds).mean()
    assert_close(loss.double(), by_hand, 1e-5)


def test_gae_is_whitened_over_all_ranks_and_only_their_verdicts():
    # without penalties, γ = λ = 1: 0.5, 0.75, −0.75 on one rank and 0.5 on the other: mean 0.25
    kept = tensor(0.5, 0.75, -0.75, 0.5)
    scaled = ((kept - 0.25) / kept.std()).tolist()
    first, second = on_ranks(
        lambda total: GAE()(token_outcomes(penalties=None, sum_over_ranks=total)),
        lambda total: GAE()(outcomes([1.0, None], token_values=tensor([0.5], [0.1]), sum_over_ranks=total)),
    )
    assert_close(first, [scaled[:2], [scaled[2], 0.0], [0.0, 0.0]], 1e-7)
    assert_close(second, [[scaled[3]], [0.0]], 1e-7)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_hybrid_of_weight_0_is_gae(whiten: bool, setting: tuple[float, float]):
    made = token_outcomes()
    assert torch.equal(HybridAdvantage(0.0, *setting, whiten)(made), GAE(*setting, whiten)(made))
    assert torch.equal(HybridAdvantage(0.5, *setting).value_targets(made), GAE(*setting).value_targets(made))


def test_a_hybrid_of_weight_1_is_r_minus_the_value_of_the_prompt():
    # 1 − 0.3 − 0.5; 0 − 0.3 − 0.75
    assert_close(HybridAdvantage(1.0)(token_outcomes()), [[0.2, 0.2], [-1.05, 0.0], [0.0, 0.0]])


def test_a_hybrid_in_between():
    # γ = λ = 0.5: a quarter of 0.2 and three of −0.3375, 0.55; the one token has the same in both
    expected = [[0.05 - 0.253125, 0.05 + 0.4125], [-1.05, 0.0], [0.0, 0.0]]
    assert_close(HybridAdvantage(0.25, 0.5, 0.5)(token_outcomes()), expected)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GAE(gamma=1.5), "`GAE.gamma`=1.5 cannot be used; it must be from 0 to 1."),
        (lambda: GAE(lam=-0.1), "`GAE.lam`=-0.1 cannot be used; it must be from 0 to 1."),
        (lambda: GAE(lam=math.nan), "`GAE.lam`=nan cannot be used; it must be from 0 to 1."),
        (lambda: HybridAdvantage(lam=2.0), "`HybridAdvantage.lam`=2.0 cannot be used; it must be from 0 to 1."),
        (lambda: HybridAdvantage(1.25), "`HybridAdvantage.weight`=1.25 is no share; use a number from 0 to 1."),
        (lambda: HybridAdvantage(-1), "`HybridAdvantage.weight`=-1 is no share; use a number from 0 to 1."),
    ],
)
def test_settings_that_cannot_be_used(make: Any, sentence: str):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    "advantage",
    [
        SequenceAdvantage(),
        BatchMeanAdvantage(),
        GroupAdvantage(),
        LeaveOneOutAdvantage(),
        GreedyBaselineAdvantage(),
        GAE(),
        HybridAdvantage(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept_and_outcomes_unchanged(advantage: Any, dtype: torch.dtype):
    made = outcomes([1.0, 0.25, None, 0.0], [2, 1, 3, 3], [0, 0, 0, 1])
    made.rewards, made.rollouts.response_mask = made.rewards.to(dtype), made.rollouts.response_mask.to(dtype)
    made.value_logits = torch.randn(4, dtype=dtype)
    made.token_values = torch.rand(4, 3, dtype=dtype)
    made.penalties = torch.rand(4, 3, dtype=dtype)
    made.greedy_rewards = torch.rand(4, dtype=dtype)
    tensors = {name: value for name, value in vars(made).items() if isinstance(value, Tensor)}
    before = {name: value.clone() for name, value in tensors.items()}
    assert advantage(made).dtype == dtype
    assert advantage.value_targets(made).dtype == dtype
    for name, value in tensors.items():
        assert torch.equal(value, before[name]), name
