"""The auxiliary loss of successes against the same formulas with plain autograd, in float64."""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import (
    AnyDigit,
    RecordingSPPO,
    loader,
    make_batch,
    make_critic,
    make_policy,
    make_trainer,
    response_log_probs,
)
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch, Success
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.found_losses import Demonstrations, FoundLoss, OffPolicySamples
from sppo_lightning.models import TinyPolicy
from sppo_lightning.pipeline import Stage
from sppo_lightning.successes import learn

TEMPERATURE = 0.7


class Learns(Stage):
    """Learns from given successes before the update, and keeps the gradient that this leaves and what is said of it."""

    requires = frozenset({"rollouts"})

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, RecordingSPPO)
        with trainer.precision_plugin.forward_context():
            self.metrics = learn(*self.arguments, TEMPERATURE, module)
        self.gradients = {
            n: None if p.grad is None else p.grad.clone() for n, p in module.policy.named_parameters()
        }


def learned(
    policy: TinyPolicy,
    successes: Sequence[Success],
    values: Sequence[float],
    shares: Sequence[float],
    loss: FoundLoss,
    coef: float,
    **settings: Any,
) -> Learns:
    stage = Learns(
        successes,
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(shares, dtype=torch.float64),
        loss,
        coef,
    )
    module = RecordingSPPO(policy, make_critic(), **settings)
    batch = make_batch(policy, ["1 + 2 =", "8 8"])
    generation = RolloutGeneration(Sampling(max_new_tokens=3))
    make_trainer(generation, AnyDigit(), stage, precision="64-true").fit(module, loader(batch))
    return stage


def log_probs(policy: TinyPolicy, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    return response_log_probs(policy, prompt, response, TEMPERATURE)


def check_gradient(stage: Learns, loss: Tensor, policy: TinyPolicy) -> None:
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    for (name, _), gradient in zip(policy.named_parameters(), expected, strict=True):
        torch.testing.assert_close(stage.gradients[name], gradient, atol=1e-12, rtol=1e-9)


PROMPTS = [[5, 13, 6], [11, 11], [4]]
RESPONSES = [[7, 1], [9, 10, 12, 1], [20, 21, 1]]


@pytest.mark.parametrize("budget", [1000, 1], ids=["one micro-batch", "each by itself"])
@pytest.mark.parametrize("loss", [Demonstrations(), OffPolicySamples(2.0)], ids=lambda x: type(x).__name__)
def test_loss_and_gradient_are_those_of_the_formula(loss: FoundLoss, budget: int):
    policy = make_policy().double()
    own = [log_probs(policy, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    # π / q is e^0.4, e^1.2 (which is truncated) and e^(−0.3)
    sampled = [row.detach() - gap / len(row) for row, gap in zip(own, (0.4, 1.2, 0.5), strict=True)]
    successes = [
        Success(
            Prompt("", "", "sums", i), PROMPTS[i], RESPONSES[i], sampled[i].tolist(), (1.0, 1.0, 0.5)[i], excess
        )
        for i, excess in enumerate((0.0, 0.0, 0.8))
    ]
    values, shares = [0.25, 0.5, 0.1], [1.0, 0.5, 0.25]
    stage = learned(make_policy(), successes, values, shares, loss, 0.3, micro_batch_tokens=budget)
    ratios = [0.75 * math.exp(0.4), 0.5 * 2.0, 0.4 * math.exp(-0.3)]
    weights = [
        s * w for s, w in zip(shares, ratios if isinstance(loss, OffPolicySamples) else [1.0] * 3, strict=True)
    ]
    expected = -sum(weight * row.sum() for weight, row in zip(weights, own, strict=True)) / 9  # tokens
    check_gradient(stage, 0.3 * expected, policy)
    assert stage.metrics == {
        "loss": pytest.approx(float(expected.detach()), rel=1e-9),
        "weight_mean": pytest.approx(sum(weights) / 3, rel=1e-9),
        "truncated_fraction": pytest.approx(1 / 3 if isinstance(loss, OffPolicySamples) else 0.0),
    }


class InExpectation(OffPolicySamples):
    """Each response as often as the density that it was sampled from says."""

    def __call__(self, log_probs: Tensor, sampled: Tensor, *rest: Tensor) -> Tensor:
        return super().__call__(log_probs, sampled, *rest) * sampled.sum(1).exp()


def test_the_expected_gradient_of_what_another_policy_sampled_is_that_on_policy():
    """All 25 responses of two tokens of five, 12 of them right: `E_μ[R π/μ (1 − V) ∇log π] = (1 − V) ∇p`."""
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}
    torch.manual_seed(1)
    policy, other = TinyPolicy("1 8", **sizes), TinyPolicy("1 8", **sizes)
    for each in (policy, other):
        each.build()
        for parameter in each.parameters():
            parameter.data.mul_(4.0)
    policy, other = policy.double(), other.double()
    right = [pair for pair in itertools.product(range(5), repeat=2) if sum(pair) % 2]
    sampled = [log_probs(other, [3, 4], pair).detach() for pair in right]
    successes = [
        Success(Prompt("1 8", "", "sums", 0), [3, 4], pair, row.tolist(), 1.0)
        for pair, row in zip(right, sampled, strict=True)
    ]
    pass_rate = sum(log_probs(policy, [3, 4], pair).sum().exp() for pair in right)
    assert (
        abs(float(pass_rate.detach()) - float(sum(row.sum().exp() for row in sampled))) > 0.05
    )  # the two policies differ
    stage = learned(copy.deepcopy(policy), successes, [0.2] * 12, [1.0] * 12, InExpectation(math.inf), 1.0)
    check_gradient(stage, -0.8 * pass_rate / 24, policy)


def test_without_successes_nothing_is_left():
    stage = learned(make_policy(), [], [], [], Demonstrations(), 1.0)
    assert stage.metrics == {"loss": 0.0}
    assert all(gradient is None for gradient in stage.gradients.values())


def test_no_success_is_unlearned():
    """R is 0.5 where a score for correct responses alone was low, and V has risen above it."""
    low = Success(Prompt("", "", "sums", 0), PROMPTS[0], RESPONSES[0], [-1.0, -1.0], 0.5)
    stage = learned(make_policy(), [low], [0.7], [1.0], OffPolicySamples(), 1.0)
    assert (stage.metrics["weight_mean"], stage.metrics["truncated_fraction"]) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in stage.gradients.values() if gradient is not None)
