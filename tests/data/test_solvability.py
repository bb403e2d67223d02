"""Draws by the critic's view and by the prompts' own record, with numbers worked out by hand."""

import numpy as np
import pytest
from curricula import bound, observe

from sppo_lightning.data import PassRateCurriculum, SolvabilityCurriculum
from sppo_lightning.errors import InputError


def test_the_posterior_counts_rewards_and_responses_and_forgets():
    curriculum = bound(PassRateCurriculum(prior_strength=2.0, half_life_iterations=1.0), 4)
    observe(curriculum, (0, 1.0), (0, 1.0), (1, 0.0), (2, 0.25))
    # an iteration later half is left: s = 1 of n = 1; 0 of 1/2; 1/8 of 1/2
    a, b = curriculum.posterior()
    assert a == pytest.approx([1 + 1, 1, 1 + 1 / 8, 1])
    assert b == pytest.approx([1, 1 + 1 / 2, 1 + 3 / 8, 1])
    observe(curriculum, (0, 0.0), (0, 0.0), (0, 1.0))  # one visit: s = 1 + 1 of n = 1 + 3, before a half is left
    a, b = curriculum.posterior()
    assert a == pytest.approx([1 + 1, 1, 1 + 1 / 16, 1])
    assert b == pytest.approx([1 + 1, 1 + 1 / 4, 1 + 3 / 16, 1])
    assert curriculum.pass_rates() == pytest.approx([1 / 2, 4 / 9, 17 / 36, 1 / 2])
    for _ in range(60):
        observe(curriculum)
    assert curriculum.pass_rates() == pytest.approx([0.5] * 4)  # an old record is none


def test_the_weight_is_the_expected_variance_of_the_reward():
    curriculum = bound(PassRateCurriculum(half_life_iterations=1e12), 5)
    observe(curriculum, (1, 1.0), (2, 1.0), (2, 0.0), *[(3, 1.0)] * 2, *[(4, 0.0)] * 8)
    # a·b / ((a + b)(a + b + 1)) of Beta(1, 1), (2, 1), (2, 2), (3, 1), (1, 9)
    expected = [1 / 6, 2 / 12, 4 / 20, 3 / 20, 9 / 110]
    assert curriculum.weights() == pytest.approx(expected)
    total = sum(expected)
    assert curriculum.probabilities() == pytest.approx([0.1 / 5 + 0.9 * w / total for w in expected])


def test_another_target_and_sharpness():
    curriculum = bound(PassRateCurriculum(0.75, sharpness=2.0, half_life_iterations=1e12), 2)
    observe(curriculum, (1, 1.0), (1, 1.0))
    # the mean of p³(1 − p): B(4, 2) / B(1, 1) = 1/20, and B(6, 2) / B(3, 1) = 3/42
    assert curriculum.weights() == pytest.approx([1 / 20, 1 / 14])


def test_records_grow_old():
    curriculum = bound(PassRateCurriculum(), 4)
    assert "staleness" not in curriculum.describe(np.array([0]))
    observe(curriculum, (0, 1.0), (1, 0.0))
    observe(curriculum, (1, 0.0))
    observe(curriculum)
    assert curriculum.describe(np.array([0]))["staleness"] == pytest.approx((3 + 2) / 2)


def test_the_critic_is_asked_every_few_iterations_and_before_that_all_prompts_are_alike():
    curriculum = bound(SolvabilityCurriculum(rescore_every_n_iterations=2, floor=0.2), 4)
    assert curriculum.probabilities() == pytest.approx([0.25] * 4)
    wanted, ages = [], []
    for _ in range(5):
        ages.append(curriculum.describe(np.array([0])).get("staleness"))
        observe(curriculum, (0, 1.0))
        wanted.append(curriculum.wants_values)
        if wanted[-1]:
            curriculum.rescore(np.array([0.5, 0.2, 0.0, 1.0 + 1e-6]))
    assert wanted == [False, True, False, True, False]
    assert ages == [None, None, 0.0, 1.0, 0.0]
    # V(1 − V) = 0.25, 0.16, 0, 0
    assert curriculum.probabilities() == pytest.approx([0.05 + 0.8 * 25 / 41, 0.05 + 0.8 * 16 / 41, 0.05, 0.05])
    assert curriculum.describe(np.array([0, 2]))["expected_pass_rate"] == 0.25


def test_a_sharper_curriculum_leaves_a_crowd_of_nearly_hopeless_prompts_few_draws():
    values = np.array([0.5, *[0.01] * 99])
    shares = []
    for sharpness in (1.0, 2.0):
        curriculum = bound(SolvabilityCurriculum(sharpness=sharpness, floor=0.1), 100)
        curriculum.rescore(values)
        shares.append(curriculum.probabilities()[0])
    # 0.25 beside 99 of 0.0099; squared, 0.0625 beside 99 of 0.00009801
    assert shares == pytest.approx([0.001 + 0.9 * 0.25 / 1.2301, 0.001 + 0.9 * 0.0625 / 0.07220299])


def test_a_critic_without_a_number_says_nothing():
    curriculum = bound(SolvabilityCurriculum(floor=0.2), 2)
    curriculum.rescore(np.array([np.nan, 1.0], dtype=np.float32))
    assert curriculum.probabilities() == pytest.approx([0.1 + 0.8, 0.1])


def test_dead_prompts_come_at_the_floors_rate_alone():
    curriculum = bound(SolvabilityCurriculum(floor=0.1), 100)
    values = np.full(100, 0.5)
    values[:30], values[30:60] = 1e-6, 1 - 1e-6
    curriculum.rescore(values)
    draws = np.concatenate([curriculum.draw(4, 0, batch) for batch in range(5000)])
    # 60 of 100 are dead and share 6 % of the draws, or hardly more, since four are drawn without replacement
    assert 0.055 < (draws < 60).mean() < 0.065
    assert len(set(draws[draws < 60])) == 60


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"target_pass_rate": 1.0},
            "`PassRateCurriculum.target_pass_rate`=1.0 does not lie between 0 and 1; use the pass rate to learn "
            "most from, such as 0.5.",
        ),
        ({"sharpness": 0.0}, "`PassRateCurriculum.sharpness`=0.0 is not above 0; use 1, or more to draw closer"),
        ({"prior_strength": -1.0}, "`PassRateCurriculum.prior_strength`=-1.0 is not above 0; use the responses"),
        (
            {"half_life_iterations": 0.0},
            "`PassRateCurriculum.half_life_iterations`=0.0 is not above 0; use as many",
        ),
        ({"floor": 0.0}, "`PassRateCurriculum.floor`=0.0 is no share that lets every prompt come; use more than 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, float], sentence: str):
    with pytest.raises(InputError) as raised:
        PassRateCurriculum(**settings)
    assert str(raised.value).startswith(sentence)


def test_scores_that_never_come():
    with pytest.raises(InputError) as raised:
        SolvabilityCurriculum(rescore_every_n_iterations=0)
    assert str(raised.value) == (
        "`SolvabilityCurriculum.rescore_every_n_iterations`=0 is not above 0; use 1 or more, such as 20."
    )
