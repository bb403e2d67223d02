"""The baseline of V and a prompt's other responses, with numbers worked out by hand or by trying all outcomes."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from by_hand import run
from given import outcomes

from sppo_lightning.advantages import SequenceAdvantage
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Outcomes
from sppo_lightning.pooling import PooledAdvantage

HALF = 0.0  # the logit of V = 1/2
QUARTER = -1.0986122886681098  # of V = 1/4


def grouped(rows: list[tuple[int, float | None, float]]) -> Outcomes:
    """Rows of the same prompt belong to one prompt of the batch."""
    given = outcomes(rows)
    index = torch.tensor([row for row, _, _ in rows])
    return dataclasses.replace(given, rollouts=dataclasses.replace(given.rollouts, prompt_index=index))


def test_v_and_the_others_make_the_baseline():
    rows = [
        (1, 1.0, QUARTER),
        (0, 0.0, HALF),
        (1, 0.0, QUARTER),
        (1, 1.0, QUARTER),
        (2, 1.0, HALF),
        (2, None, HALF),
    ]
    found = PooledAdvantage(prior_strength=2.0)(grouped(rows)).tolist()
    # the prompt 1: (2 · 1/4 + others) / 4, of 1, 2 and 1 successes; the prompt 2 has one judged response
    assert found[:5] == pytest.approx([1 - 1.5 / 4, -1 / 2, -2.5 / 4, 1 - 1.5 / 4, 1 / 2])


def test_one_response_is_sppo_bit_for_bit():
    torch.manual_seed(1)
    given = grouped([(i, float(i % 2), 0.0) for i in range(64)])
    given = dataclasses.replace(given, value_logits=torch.randn(64), rewards=given.rewards.float())
    assert torch.equal(PooledAdvantage(prior_strength=3.0)(given), SequenceAdvantage()(given))
    module, _ = run(advantage=PooledAdvantage())
    plain, _ = run()
    for name, gradient in module.gradients[0].items():
        assert torch.equal(gradient, plain.gradients[0][name]), name


@pytest.mark.parametrize("value", [HALF, QUARTER])
def test_the_gradient_is_unbiased_whatever_v_is(value: float):
    # a policy that is right with the chance p: the score of a right response is 1 − p, of a wrong one −p
    p, expected = 0.3, 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=3):
        chance = 1.0
        for reward in rewards:
            chance *= p if reward else 1 - p
        advantages = PooledAdvantage(prior_strength=2.0)(grouped([(0, reward, value) for reward in rewards]))
        scores = [reward - p for reward in rewards]
        expected += chance * sum(a * s for a, s in zip(advantages.tolist(), scores, strict=True))
    assert expected == pytest.approx(3 * p * (1 - p))  # three times the gradient of p


def test_k_after_one_iteration_and_two():
    advantage = PooledAdvantage(prior_strength=4.0, running_decay=0.5)
    rows = [
        (0, 1.0, HALF),
        (0, 1.0, HALF),
        (1, 1.0, QUARTER),
        (1, 0.0, QUARTER),
        (1, None, QUARTER),
        (2, 1.0, HALF),
    ]
    assert advantage.learn(grouped(rows)) == {"critic/prior_strength": 4.0}
    # prompt 0: squares 1/4, product 1/4; prompt 1: (9/16 + 1/16) / 2 and −3/16; at first 4 and 4 / 5, halved
    squares, products = 2 + 1 / 4 + 5 / 16, 2 / 5 + 1 / 4 - 3 / 16
    assert advantage.prior_strength == pytest.approx(squares / products - 1)
    alone = grouped([(3, 1.0, HALF), (4, None, HALF), (4, 1.0, HALF)])
    advantage.learn(alone)  # says nothing of k
    assert advantage.prior_strength == pytest.approx(squares / products - 1)
    for _ in range(9):
        advantage.learn(grouped([(1, 1.0, HALF), (1, 0.0, HALF)]))  # V seems to be right
    assert advantage.prior_strength == 256
    for _ in range(30):
        advantage.learn(grouped([(1, 1.0, -9.0), (1, 1.0, -9.0)]))  # V is wrong, and there is no noise
    assert advantage.prior_strength == 0.25


def test_k_is_found_where_it_is_known():
    """Pass rates from Beta(k V, k (1 − V)) are what a V that counts as k responses means."""
    torch.manual_seed(0)
    prompts, k = 4000, 6.0
    rates = torch.distributions.Beta(0.25 * k, 0.75 * k).sample((prompts, 1))
    rewards = torch.bernoulli(rates.expand(-1, 3)).double().flatten()
    given = outcomes([(0, 0.0, QUARTER)] * (3 * prompts))
    index = torch.arange(prompts).repeat_interleave(3)
    given = dataclasses.replace(
        given, rewards=rewards, rollouts=dataclasses.replace(given.rollouts, prompt_index=index)
    )
    advantage = PooledAdvantage(prior_strength=1.0)
    advantage.learn(given)
    assert advantage.prior_strength == pytest.approx(k, rel=0.15)


def test_a_fixed_k_stays():
    advantage = PooledAdvantage(prior_strength=3.0, estimate=False)
    advantage.learn(grouped([(0, 1.0, HALF), (0, 1.0, HALF)]))
    assert advantage.prior_strength == 3.0
    other = PooledAdvantage(prior_strength=5.0)
    advantage.load_state_dict(other.state_dict())
    assert advantage.prior_strength == 3.0


def test_state_goes_through_a_checkpoint():
    first: Any = PooledAdvantage()
    first.learn(grouped([(0, 1.0, HALF), (0, 1.0, HALF)]))
    second = PooledAdvantage()
    second.load_state_dict(first.state_dict())
    assert vars(second) == vars(first)
    assert second.prior_strength != 4.0


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(InputError) as raised:
        PooledAdvantage(prior_strength=0)
    assert str(raised.value) == (
        "`PooledAdvantage.prior_strength`=0 is no number of responses that V may count as; use 0.25 to 256, such as 4."
    )
    with pytest.raises(InputError, match="`PooledAdvantage.running_decay`=1.5 is no share to keep; use 0 to 1"):
        PooledAdvantage(running_decay=1.5)
