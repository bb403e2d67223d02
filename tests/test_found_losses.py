"""Weights of what a search found, by hand."""

import math

import pytest
import torch

from sppo_lightning.errors import InputError
from sppo_lightning.found_losses import Demonstrations, OffPolicySamples


def test_off_policy_weights_by_hand():
    """A response of 2 tokens, found 4 times as often as the policy says; the policy now likes it `e^0.5` as much."""
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    sampled = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    now = torch.tensor([[-0.5, -2.0, 0.0], [-0.5, -0.5, -0.5]])
    excess = torch.tensor([math.log(4.0), 0.0])
    weights = OffPolicySamples(max_weight=2.0)(now, sampled, mask, torch.tensor([0.8, 0.5]), excess)
    assert weights.tolist() == pytest.approx([0.8 * math.exp(0.5) / 4, 0.5 * 2.0])


def test_demonstrations_count_alike():
    nothing = torch.zeros(2, 3)
    assert Demonstrations()(
        nothing, nothing, nothing, torch.tensor([0.9, 0.1]), torch.tensor([7.0, 0.0])
    ).tolist() == [1, 1]


def test_a_weight_that_teaches_nothing_is_refused():
    with pytest.raises(InputError, match="`OffPolicySamples.max_weight`=0"):
        OffPolicySamples(max_weight=0)
