"""Where further responses are worth most, with every number worked out by hand or by trying all divisions."""

import itertools

import pytest
import torch
from given import outcomes

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Experience
from sppo_lightning.uncertainty import Belief, CriticVariance, RecordVariance, allocate


def experience(rows: list[tuple[int, float | None]]) -> Experience:
    given = outcomes([(row, reward, 0.0) for row, reward in rows])
    return Experience(given.rollouts, given.rewards, given.rewards, given.verdicts)


def prompts(*rows: int) -> list[Prompt]:
    return [Prompt("", "", "sums", row) for row in rows]


def test_the_variance_of_a_beta_and_what_responses_leave_of_it():
    # Beta(1, 3): ab / ((a + b)² (a + b + 1)) = 3 / (16 · 5)
    assert Belief(0.25, 4.0).variance() == pytest.approx(3 / 80)
    # one response: a success with the chance 1/4, then Beta(2, 3), or a failure, then Beta(1, 4)
    after = 1 / 4 * 6 / (25 * 6) + 3 / 4 * 4 / (25 * 6)
    assert Belief(0.25, 4.0).variance(1) == pytest.approx(after)


def test_responses_go_where_they_lower_the_variance_most():
    # k = 1: variance(n) = m (1 − m) / (2 (1 + n)). m = 1/2: 1/8, 1/16, 1/24, 1/32; m = 1/10: 0.045, 0.0225, 0.015
    beliefs = [Belief(0.1, 1.0), Belief(0.5, 1.0), Belief(0.0, 1.0)]
    # gains: 0.0625 (second), 0.0225 (first), 0.0208 (second), 0.0104 (second), 0.0075 (first); none for the third
    divisions = [allocate(beliefs, count, 9) for count in range(6)]
    assert divisions == [[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 2, 0], [1, 3, 0], [2, 3, 0]]
    assert allocate(beliefs, 5, 2) == [2, 2, 0]  # most for each
    assert allocate(beliefs, 99, 2) == [2, 2, 0]  # and no prompt that is sure
    assert allocate(beliefs, -3, 2) == [0, 0, 0]
    assert allocate([], 3, 2) == []


def test_the_first_of_equals_is_served_first():
    assert allocate([Belief(0.5, 4.0)] * 3, 4, 9) == [2, 1, 1]
    # 0.3 and 0.7 are equally unsure, whatever the last digit says
    assert allocate([Belief(0.7, 4.0), Belief(0.3, 4.0)], 1, 9) == allocate(
        [Belief(0.3, 4.0), Belief(0.7, 4.0)], 1, 9
    )


def test_no_other_division_leaves_less_variance():
    beliefs = [Belief(0.5, 3.0), Belief(0.2, 1.0), Belief(0.9, 8.0), Belief(0.4, 0.5)]

    def left(division: tuple[int, ...]) -> float:
        return sum(belief.variance(count) for belief, count in zip(beliefs, division, strict=True))

    for count in range(9):
        every = [each for each in itertools.product(range(5), repeat=4) if sum(each) == count]
        assert left(tuple(allocate(beliefs, count, 4))) == pytest.approx(min(map(left, every)), abs=1e-12)


def test_the_critic_alone_knows_prompts_by_v():
    assert CriticVariance().beliefs(prompts(3, 1), [0.25, 0.5], 4.0) == [Belief(0.25, 4.0), Belief(0.5, 4.0)]


def test_a_record_makes_surer():
    source = RecordVariance(decay=0.5)
    source.learn(experience([(1, 1.0), (1, 0.0), (2, 1.0), (3, None)]))
    source.learn(experience([(2, 1.0)]))
    # the first: 1 of 2; the second: 1/2 + 1 of 1/2 + 1; the third was not judged
    found = source.beliefs(prompts(1, 2, 3), [0.25] * 3, 4.0)
    assert found == [Belief(2 / 6, 6.0), Belief(2.5 / 5.5, 5.5), Belief(0.25, 4.0)]
    again = RecordVariance(decay=0.5)
    again.load_state_dict(source.state_dict())
    assert again.beliefs(prompts(1, 2, 3), [0.25] * 3, 4.0) == found
    with pytest.raises(InputError, match="`RecordVariance.decay`=2 is no share to keep; use 0 to 1, such as 0.9."):
        RecordVariance(decay=2)


def test_a_belief_is_right_where_pass_rates_are_drawn_from_it():
    torch.manual_seed(0)
    belief = Belief(0.3, 5.0)
    rates = torch.distributions.Beta(1.5, 3.5).sample((200_000,)).double()
    successes = torch.binomial(torch.full_like(rates, 3.0), rates)
    posterior = (1.5 + successes) / 8.0
    assert float((rates - posterior).square().mean()) == pytest.approx(belief.variance(3), rel=0.02)
