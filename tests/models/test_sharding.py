"""Models of every family, spread over two ranks, compute and learn what they do whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import on_ranks
from test_policy import rollouts_of
from tiny import FAMILIES, FamilyPolicy
from torch.distributed.device_mesh import init_device_mesh

from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.models.sharding import is_sharded, local, shard, whole

CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES}
CASES["qwen2, activations recomputed"] = ("qwen2", {"gradient_checkpointing": True})


def learned(policy: FamilyPolicy) -> dict[str, Any]:
    """Log-probabilities, gradients, and log-probabilities after a step, of the very weights that follow from it."""
    rollouts = rollouts_of(policy, 0.7)
    log_probs, entropy = policy(rollouts)
    (log_probs.sum() + 0.1 * entropy.sum()).backward()
    gradients = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    with torch.no_grad():
        frozen = policy(rollouts)[0]  # a forward without a backward must not keep the weights of before
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad.sign()
        after = policy(rollouts)[0]
    found = {"log_probs": log_probs, "frozen": frozen, "after": after, **gradients}
    return {name: value.detach().clone() for name, value in found.items()}


def on_each_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found = {}
    for name, (family, settings) in CASES.items():
        policy = FamilyPolicy(family, **settings)
        numbers = sum(p.numel() for p in policy.parameters())
        shard(policy, mesh)
        assert is_sharded(policy)
        assert sum(local(p).numel() for p in policy.parameters()) < 0.6 * numbers
        before = {n: whole(p).detach().clone() for n, p in policy.named_parameters()}
        found[name] = learned(policy)
        copied = WholeCopy(policy)
        copied.follow()
        with torch.no_grad():
            found[name]["copy"] = copied.policy(rollouts_of(policy, 0.7))[0]
        assert type(copied.policy) is FamilyPolicy
        assert any(not torch.equal(whole(p), before[n]) for n, p in policy.named_parameters())
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), on_each_rank)


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_learns_what_a_whole_one_does(ranks: list[dict[str, Any]], case: str) -> None:
    family, settings = CASES[case]
    expected = learned(FamilyPolicy(family, **settings))
    expected["copy"] = expected["after"]
    for found in ranks:
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[case][name], value, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_weights_that_are_not_sharded_are_what_they_are(tmp_path: Path) -> None:
    weight = torch.ones(2)
    assert whole(weight) is weight
    assert local(weight) is weight
    assert not is_sharded(FamilyPolicy("qwen2"))
