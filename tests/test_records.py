"""Records of prompts, by hand."""

import pytest

from sppo_lightning.records import PromptRecords

ONE, OTHER = ("sums", 1), ("sums", 2)


def test_the_prior_is_what_is_given_or_the_running_mean():
    records = PromptRecords(decay=0.5, running_decay=0.5)
    assert (records.mean(ONE, 2.0), records.mean(ONE, 2.0, prior=0.1)) == (0.5, pytest.approx(0.1))
    records.enter([(ONE, 1.0), (ONE, 0.0), (OTHER, 0.0), (OTHER, 0.0)])  # two visits; p = 1/4
    assert records.mean(ONE, 2.0) == pytest.approx((2 / 4 + 1) / 4)
    assert records.mean(ONE, 2.0, prior=0.1) == pytest.approx((0.2 + 1) / 4)
    records.enter([(ONE, 1.0)])  # s = 1/2 + 1 of n = 1 + 1; p = (1/2 + 1) / (2 + 1)
    assert records.mean(ONE, 2.0) == pytest.approx((2 / 2 + 1.5) / 4)
    assert records.mean(OTHER, 2.0, prior=0.0) == 0.0


def test_an_iteration_without_rewards_changes_nothing_and_state_goes_through_a_checkpoint():
    records = PromptRecords(decay=0.5)
    records.enter([(ONE, 1.0), (OTHER, 0.0)])
    again = PromptRecords(decay=0.5)
    again.load_state_dict(records.state_dict())
    records.enter([])
    assert again == records
    assert again.sums == {ONE: (1.0, 1.0), OTHER: (0.0, 1.0)}
