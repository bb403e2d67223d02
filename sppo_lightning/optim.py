"""One AdamW with a parameter group per module, each with its own rate, decay and gradient clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sppo_lightning.errors import InputError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class GroupOptimizer:
    """How AdamW moves one module.

    Args:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay of AdamW's two averages.
        max_grad_norm: The module's gradient is scaled down to this norm before each update.
        warmup_updates: Updates over which the learning rate rises from zero.
    """

    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("lr", self.lr, 0 <= self.lr < math.inf, "0 or more, and finite"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more, and finite"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers from 0, and below 1"),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0, or .inf to leave it unclipped"),
            ("warmup_updates", self.warmup_updates, self.warmup_updates >= 0, "0 or more"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise InputError(f"`{name}`={value} of an optimizer cannot be used; it must be {allowed}.")


def build_optimizer(
    modules: dict[str, tuple[nn.Module, GroupOptimizer]],
    schedule: Schedule,
    total_updates: int,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over all modules, and its schedule in updates.

    `total_updates` is `trainer.max_steps`; linear and cosine decay end there, so they need it to be set.
    """
    if schedule != "constant" and total_updates < 1:
        raise InputError(
            f"`lr_schedule`={schedule!r} reaches zero at `trainer.max_steps`, which is not set; set it."
        )
    groups = [
        {
            "name": name,
            "params": [p for p in module.parameters() if p.requires_grad],
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "betas": tuple(settings.betas),
        }
        for name, (module, settings) in modules.items()
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    shares = [_share_of_peak(schedule, settings.warmup_updates, total_updates) for _, settings in modules.values()]
    return optimizer, LambdaLR(optimizer, shares)


def _share_of_peak(schedule: Schedule, warmup_updates: int, total_updates: int) -> Callable[[int], float]:
    """The share of its peak that a learning rate has at an update, counted from 0."""
    name = "constant_with_warmup" if schedule == "constant" else schedule
    lone = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # transformers has one warm-up for all groups of an optimizer
    return get_scheduler(name, lone, warmup_updates, max(total_updates, 1)).lr_lambdas[0]
