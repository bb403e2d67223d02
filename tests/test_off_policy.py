"""Responses of another policy than the present one: the weight that corrects for it, and the reference that samples."""

import copy
from typing import Any

import pytest
import torch
from tiny import EvenRows, RecordingSPPO, loader, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning.callbacks import ReferenceRefresh, RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.objectives import ImportanceWeightedObjective
from sppo_lightning.optim import GroupOptimizer

PROMPTS = ["1 + 2 =", "8 8", "4 ; 4 ; 4", "q r s t u"]
MAX_WEIGHT = 1.02


class Remembers(RecordingSPPO):
    """Keeps policy, reference and batch as they were before each iteration's updates."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.before: list[tuple[Any, Any, Any, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        modules = copy.deepcopy((self.policy, self.reference))
        self.before.append((*modules, batch, self.reference_version))
        super().training_step(batch, batch_idx)


def trained(*callbacks: Any, iterations: int, **settings: Any) -> Remembers:
    settings = {"objective": ImportanceWeightedObjective(level="sequence", max_weight=MAX_WEIGHT)} | settings
    optimizer = GroupOptimizer(lr=0.002, weight_decay=0.0)
    module = Remembers(make_policy(), make_critic(zero=True), policy_optimizer=optimizer, **settings)
    stages = [RolloutGeneration(Sampling(max_new_tokens=6), sample_from="reference"), EvenRows(), *callbacks]
    trainer = make_trainer(*stages, precision="64-true")
    trainer.fit(module, loader(*(make_batch(module.policy, PROMPTS) for _ in range(iterations))))  # type: ignore[arg-type]
    return module


def log_probs(policy: Any, rollouts: Any, row: int) -> torch.Tensor:
    prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row] > 0].tolist()
    response = rollouts.response_ids[row][rollouts.response_mask[row] > 0].tolist()
    table = policy.model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def test_the_joint_weight_to_the_reference_that_sampled():
    module = trained(iterations=3)
    weights = []
    for (policy, reference, batch, _), gradients in zip(module.before, module.gradients, strict=True):
        rollouts = batch.rollouts
        values = batch.value_logits.sigmoid()
        tokens = float(rollouts.response_mask.sum())
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(len(rollouts)):
            own = log_probs(policy, rollouts, row)
            weight = (own.sum() - log_probs(reference, rollouts, row).sum()).exp().item()
            weights.append(weight)
            advantage = (rollouts.rewards[row] - values[row]).item()
            loss = loss - min(weight, MAX_WEIGHT) * advantage * own.sum() / tokens
        loss.backward()
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(gradients[f"policy.{name}"], parameter.grad, atol=1e-6, rtol=1e-5)
    assert weights[:4] == pytest.approx([1.0] * 4, abs=1e-6)  # nothing has moved yet
    moved = weights[4:]
    assert min(moved) < 0.98
    assert max(moved) > MAX_WEIGHT  # or nothing would be truncated


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_the_reference_follows(mix: float):
    module = trained(ReferenceRefresh(every_n_updates=2, mix=mix), iterations=4)
    policies, references, _, versions = zip(*module.before, strict=True)
    start = dict(references[0].named_parameters())
    for name, later in references[1].named_parameters():
        assert torch.equal(later, start[name])  # after one update it has not followed
    policy_then = dict(policies[2].named_parameters())
    for name, later in references[2].named_parameters():
        expected = mix * policy_then[name] + (1 - mix) * start[name]
        torch.testing.assert_close(later, expected, atol=1e-12, rtol=0.0)
    assert any(not torch.equal(policy_then[name], start[name]) for name in start)
    assert list(versions) == ([0, 0, 2, 2] if mix == 1 else [0, 0, -1, -1])
    # the sampler is the reference: its version stands on the rollouts
    assert [batch.rollouts.policy_versions.tolist() for _, _, batch, _ in module.before] == [
        [v] * 4 for v in versions
    ]
