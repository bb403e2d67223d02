import math
from typing import Any

import pytest
import torch
from torch import nn

from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer, build_optimizer


def two_modules(warmup_updates: int = 0) -> dict[str, tuple[nn.Module, GroupOptimizer]]:
    policy, critic = nn.Linear(2, 1), nn.Linear(2, 1)
    policy.bias.requires_grad_(False)
    settings = GroupOptimizer(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), warmup_updates=warmup_updates)
    return {"policy": (policy, settings), "critic": (critic, GroupOptimizer(lr=0.25, weight_decay=0.0))}


def rates(schedule: Any, warmup_updates: int, total_updates: int, updates: int, group: int = 0) -> list[float]:
    """A group's learning rate as a share of its peak, update by update; the warm-up is the policy's."""
    optimizer, scheduler = build_optimizer(two_modules(warmup_updates), schedule, total_updates)
    peak = (0.5, 0.25)[group]
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[group]["lr"] / peak)
        optimizer.step()
        scheduler.step()
    return found


def test_a_group_for_each_module_with_its_own_settings():
    modules = two_modules()
    optimizer, _ = build_optimizer(modules, "constant", -1)
    names = ["name", "lr", "weight_decay", "betas"]
    assert [[group[name] for name in names] for group in optimizer.param_groups] == [
        ["policy", 0.5, 0.1, (0.8, 0.9)],
        ["critic", 0.25, 0.0, (0.9, 0.999)],
    ]
    policy, critic = (module for module, _ in modules.values())
    members = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert members == [[id(policy.weight)], [id(critic.weight), id(critic.bias)]]  # what is frozen has no state


def test_the_first_step_of_adamw_by_hand():
    modules = two_modules()
    policy = modules["policy"][0]
    with torch.no_grad():
        policy.weight.copy_(torch.tensor([[1.0, -2.0]]))
    optimizer, _ = build_optimizer(modules, "constant", -1)
    policy.weight.grad = torch.tensor([[0.3, 4.0]])
    optimizer.step()
    # both averages start unbiased, so a step has the size of the rate; decay takes 0.5 · 0.1 of the weight
    torch.testing.assert_close(policy.weight.data, torch.tensor([[1.0 * 0.95 - 0.5, -2.0 * 0.95 - 0.5]]))


def test_constant_after_the_warm_up():
    assert rates("constant", 0, -1, 3) == [1, 1, 1]
    assert rates("constant", 4, -1, 6) == [0, 0.25, 0.5, 0.75, 1, 1]


def test_each_module_warms_up_on_its_own():
    assert rates("constant", 4, -1, 3, group=1) == [1, 1, 1]
    assert rates("linear", 2, 4, 5, group=1) == [1, 0.75, 0.5, 0.25, 0]


def test_linear_and_cosine_end_at_max_steps():
    assert rates("linear", 2, 6, 7) == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    cosine = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    assert rates("cosine", 2, 6, 7) == pytest.approx([0, 0.5, *cosine])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_needs_an_end(schedule: Any):
    with pytest.raises(InputError) as raised:
        build_optimizer(two_modules(), schedule, -1)
    assert str(raised.value) == (
        f"`lr_schedule`='{schedule}' reaches zero at `trainer.max_steps`, which is not set; set it."
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": -1e-6}, "`lr`=-1e-06 of an optimizer cannot be used; it must be 0 or more, and finite."),
        (
            {"weight_decay": -0.1},
            "`weight_decay`=-0.1 of an optimizer cannot be used; it must be 0 or more, and finite.",
        ),
        (
            {"max_grad_norm": 0.0},
            "`max_grad_norm`=0.0 of an optimizer cannot be used; it must be above 0, or .inf to leave it unclipped.",
        ),
        ({"warmup_updates": -1}, "`warmup_updates`=-1 of an optimizer cannot be used; it must be 0 or more."),
        ({"lr": math.nan}, "`lr`=nan of an optimizer cannot be used; it must be 0 or more, and finite."),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, float], sentence: str):
    with pytest.raises(InputError) as raised:
        GroupOptimizer(**settings)
    assert str(raised.value) == sentence


def test_an_infinite_norm_leaves_the_gradient_as_it_is():
    module = nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3e4, 4e4]]), torch.tensor([0.0])
    norm = nn.utils.clip_grad_norm_(module.parameters(), GroupOptimizer(max_grad_norm=math.inf).max_grad_norm)
    assert (float(norm), module.weight.grad.tolist()) == (5e4, [[3e4, 4e4]])
