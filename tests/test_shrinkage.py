"""The shrunk baseline, with every number worked out by hand."""

from typing import Any

import pytest
import torch
from by_hand import CASES, ByHand, assert_equal, run
from given import outcomes
from tiny import make_chain_sppo, make_trainer

from sppo_lightning.errors import InputError
from sppo_lightning.replay import CriticReplay
from sppo_lightning.shrinkage import ShrunkSequenceAdvantage

HALF = 0.0  # the logit of V = 1/2
QUARTER = -1.0986122886681098  # of V = 1/4


def test_before_any_outcome_it_is_sppo():
    advantage = ShrunkSequenceAdvantage()
    assert advantage(outcomes([(0, 1.0, QUARTER), (1, 0.0, HALF)])).tolist() == pytest.approx([0.75, -0.5])


def test_weight_and_record_after_one_and_two_visits():
    advantage = ShrunkSequenceAdvantage(prior_strength=2.0, decay=0.5, running_decay=0.5)
    # m = 1/2 for all: squares of the record 4 × 1/4 = 1; of the critic 9/16 + 1/16 + 1/16 + 1/4 = 15/16
    logged = advantage.learn(outcomes([(0, 1.0, QUARTER), (1, 0.0, QUARTER), (2, 0.0, QUARTER), (3, 0.0, HALF)]))
    assert logged == {"critic/shrinkage_weight": 1.0, "critic/record_brier": pytest.approx(0.25)}
    assert advantage.weight == pytest.approx(1 / (1 + 15 / 16))  # = 16/31, more to the better predictor
    # p = 1/4, so m = (2/4 + 1) / (2 + 1) = 1/2 for the solved one, 1/6 for the others, 1/4 without a record
    means = [advantage.records.mean(("sums", row), 2.0) for row in (0, 1, 9)]
    assert means == pytest.approx([1 / 2, 1 / 6, 1 / 4])
    assert advantage.records.mean(("other", 0), 2.0) == pytest.approx(1 / 4)  # the same row of another data set
    second = outcomes([(0, 1.0, HALF), (1, 1.0, QUARTER)])
    w = 16 / 31
    assert advantage(second).tolist() == pytest.approx([1 - 1 / 2, 1 - w / 4 - (1 - w) / 6])
    logged = advantage.learn(second)
    # the record's squares are of m before these outcomes: 1/4 and 25/36
    assert logged == {
        "critic/shrinkage_weight": pytest.approx(w),
        "critic/record_brier": pytest.approx((1 / 4 + 25 / 36) / 2),
    }
    record, critic = 1 / 2 + 1 / 4 + 25 / 36, 15 / 32 + 1 / 4 + 9 / 16
    assert advantage.weight == pytest.approx(record / (record + critic))
    # p = (1/2 + 2) / (4/2 + 2) = 5/8; s and n of row 0: 1/2 + 1 = 3/2 of 3/2; of row 1: 1 of 3/2
    means = [advantage.records.mean(("sums", row), 2.0) for row in (0, 1, 9)]
    assert means == pytest.approx([(5 / 4 + 3 / 2) / 3.5, (5 / 4 + 1) / 3.5, 5 / 8])


def test_several_responses_are_one_visit_and_no_verdict_is_none():
    advantage = ShrunkSequenceAdvantage(prior_strength=1.0, decay=0.5)
    advantage.learn(outcomes([(0, 1.0, HALF), (0, 0.0, HALF), (0, 1.0, HALF), (1, None, HALF)]))
    assert advantage.records.sums == {("sums", 0): (2.0, 3.0)}
    assert advantage.records.running_mean == pytest.approx(2 / 3)
    assert advantage.learn(outcomes([(1, None, HALF)])) == {"critic/shrinkage_weight": 0.5}
    assert advantage.records.sums == {("sums", 0): (2.0, 3.0)}


def test_state_goes_through_a_checkpoint():
    first = ShrunkSequenceAdvantage()
    first.learn(outcomes([(0, 1.0, QUARTER), (1, 0.0, HALF)]))
    second = ShrunkSequenceAdvantage()
    second.load_state_dict(first.state_dict())
    assert vars(second) == vars(first)
    assert second.weight != 1.0


def test_a_run_of_plain_sppo_can_go_on_with_it():
    checkpoint: dict[str, Any] = {}
    plain = make_chain_sppo(1e-2)
    plain.trainer = make_trainer()
    plain.on_save_checkpoint(checkpoint)
    module = make_chain_sppo(1e-2, advantage=ShrunkSequenceAdvantage(), critic_replay=CriticReplay())
    module.on_load_checkpoint(checkpoint)
    assert vars(module.advantage) == vars(ShrunkSequenceAdvantage())


class Known(ShrunkSequenceAdvantage):
    """Begins with a record of each prompt and w = 1/4."""

    def __init__(self) -> None:
        super().__init__(prior_strength=2.0)
        self.records.sums = {("sums", i): (float(i % 3), 3.0) for i in range(8)}
        self.records.rewards, self.records.responses = 1.0, 5.0
        self.critic_error, self.record_error = 3.0, 1.0


def test_it_moves_the_policy_and_not_the_critics_target():
    module, trainer = run(advantage=Known())
    expected = ByHand()
    for i, row in enumerate(expected.rows):
        row["V"] = (
            row["V"] / 4 + 3 / 4 * (2 / 5 + i % 3) / 5
        )  # ByHand's policy takes it from here; its critic does not
    expected.update(list(range(8)))
    assert_equal(module.gradients[0], expected.gradients[0])
    plain, _ = run()
    for name, gradient in module.gradients[0].items():
        assert torch.equal(gradient, plain.gradients[0][name]) == name.startswith("critic"), name
    logged: Any = trainer.callback_metrics
    assert float(logged["critic/shrinkage_weight"]) == 0.25
    rewards = [rows[0][1] or 0.0 for rows in CASES.values()]
    brier = sum((r - (2 / 5 + i % 3) / 5) ** 2 for i, r in enumerate(rewards)) / 8
    assert float(logged["critic/record_brier"]) == pytest.approx(brier)


def test_settings_that_make_no_record_are_refused():
    with pytest.raises(InputError, match="`ShrunkSequenceAdvantage.prior_strength`=0 leaves a prompt without"):
        ShrunkSequenceAdvantage(prior_strength=0)
    with pytest.raises(InputError, match="`ShrunkSequenceAdvantage.decay`=1.5 is no share to keep; use 0 to 1"):
        ShrunkSequenceAdvantage(decay=1.5)
