"""Layers cut over pairs of ranks, and spread over two pairs, learn what they do whole; what cannot be is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import on_ranks
from test_policy import rollouts_of
from tiny import FamilyPolicy, make_chain_sppo, make_critic, make_policy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.errors import InputError
from sppo_lightning.models import LoRA
from sppo_lightning.models.sharding import local, shard, whole
from sppo_lightning.models.tensor_parallel import parallelize

HEADS = {"num_key_value_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, config, settings
    "tied, end to end": ("qwen2", {"tie_word_embeddings": True}, {"packed": True}),
    "biases, activations recomputed": (
        "llama",
        {"num_attention_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"gradient_checkpointing": True},
    ),
    "norms of heads": ("qwen3", {"head_dim": 8}, {}),
    "gemma2": ("gemma2", {}, {}),
    "cohere": ("cohere", {}, {}),
    "adapters": ("qwen2", {}, {"lora": LoRA(rank=2)}),
}


def policy_of(case: str) -> FamilyPolicy:
    family, config, settings = CASES[case]
    return FamilyPolicy(family, HEADS | config, **settings)


ROWS: list[list[int]] = [[1], [2], [], [0, 3]]  # of each rank: a pair's need not be as many, nor as many tokens


def learned(policy: FamilyPolicy, rows: list[int], pairs: int = 1) -> dict[str, Any]:
    """Log-probabilities of these rows, gradients of all ranks' rows, and log-probabilities after a step.

    Gradients are averaged over the pairs of ranks.
    """
    rollouts = rollouts_of(policy, 0.7).rows(rows)
    log_probs, _ = policy(rollouts)
    (pairs * log_probs.square().sum()).backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), torch.inf))
    gradients = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    torch.optim.AdamW(policy.parameters(), lr=0.01, fused=True).step()
    with torch.no_grad():
        after, _ = policy(rollouts)
    found = {"log_probs": log_probs, "after": after, "norm": norm, **gradients}
    return {name: value.detach().clone() for name, value in found.items()}


def groups_of_a_pair(pair: DeviceMesh) -> list[list[int]]:
    """Of rows of these lengths on each rank, within 10 tokens."""
    module = make_chain_sppo(1e-3, micro_batch_tokens=10)
    module.policy.group = pair
    return module.groups([[9, 2], [4], [], [3, 3]][dist.get_rank()])


def on_each_rank() -> dict[str, Any]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found = {}
    for case in CASES:
        policy = policy_of(case)
        numbers = sum(p.numel() for n, p in policy.named_parameters() if "_proj" in n)
        shard(policy, mesh)
        assert sum(local(p).numel() for n, p in policy.named_parameters() if "_proj" in n) < 0.3 * numbers
        found[case] = learned(policy, ROWS[dist.get_rank()], pairs=2)
        copied = WholeCopy(policy)
        copied.follow()
        with torch.no_grad():
            found[case]["copy"] = copied.policy(rollouts_of(policy, 0.7))[0]
    found["groups"] = groups_of_a_pair(mesh["tensor_parallel"])
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(4, tmp_path_factory.mktemp("ranks"), on_each_rank)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_cut_learn_what_they_do_whole(ranks: list[dict[str, Any]], case: str) -> None:
    policy = policy_of(case)
    expected = learned(policy, [0, 1, 2, 3])
    expected["copy"] = policy(rollouts_of(policy, 0.7))[0].detach()
    for found, rows in zip(ranks, ROWS, strict=True):
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            wanted = value[rows] if name in ("log_probs", "after") else value
            torch.testing.assert_close(found[case][name], wanted, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.slow
def test_a_pair_shares_the_budget_of_a_forward(ranks: list[dict[str, Any]]) -> None:
    # 9; 4 and 2; and of the other pair 3 and 3
    assert [found["groups"] for found in ranks] == [[[0], [1]], [[], [0]], [[]], [[0, 1]]]


class Pair:
    """As much of a group as is asked before a rank is needed."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
REFUSED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "no plan": (lambda: FamilyPolicy("gpt2"), 2, "has no plan for it"),
    "a style": (lambda: FamilyPolicy("qwen3_moe", HEADS | EXPERTS), 2, "as 'moe_tp_experts', which is not"),
    "heads": (
        lambda: FamilyPolicy("qwen2", {"num_attention_heads": 4}),
        2,
        "does not divide num_key_value_heads=1",
    ),
    "width": (
        lambda: FamilyPolicy("qwen2", {**HEADS, "intermediate_size": 33}),
        2,
        "does not divide the width of `layers.0.mlp.gate_proj`=33",
    ),
    "many ranks": (lambda: FamilyPolicy("qwen2", HEADS), 4, "does not divide num_attention_heads=2"),
    "the critic": (lambda: make_critic(), 3, "`model.critic` (Qwen2ForSequenceClassification): it does not divide"),
    "dropout": (lambda: make_policy(lora=LoRA(dropout=0.1)), 2, "`model.policy.lora.dropout` would differ"),
    "compiled": (
        lambda: FamilyPolicy("qwen2", HEADS, compile=True),
        2,
        "`model.policy.compile` has not been tried",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused(case: str) -> None:
    build, ranks, sentence = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(sentence)) as refusal:
        parallelize(build(), Pair(ranks))  # type: ignore[arg-type]
    assert str(refusal.value).startswith(f"`tensor_parallel_size`={ranks}")
    assert "; use " in str(refusal.value)
