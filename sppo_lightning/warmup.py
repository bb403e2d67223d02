"""Critic warm-up: how long the critic learns alone, before its advantages move the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.errors import InputError


class CriticWarmup:
    """Holds the policy still for a number of updates, or until the critic is good enough.

    Skill is measured on an iteration's responses before the critic has learned from them. The policy moves once
    every condition holds, or after `max_updates`.

    Args:
        updates: Updates of the critic alone, at least.
        min_brier_skill: Wait until the critic removes this share of the batch mean's squared error; 0 is as good
            as the batch mean, 1 is perfect. Left out: not asked.
        min_auroc: Wait until the critic ranks this share of (solved, unsolved) pairs rightly; 0.5 is chance. Left
            out: not asked.
        max_updates: The wait ends here, whatever the skill.
    """

    def __init__(
        self,
        updates: int = 0,
        min_brier_skill: float | None = None,
        min_auroc: float | None = None,
        max_updates: int = 200,
    ) -> None:
        if updates < 0 or max_updates < updates:
            raise InputError(
                f"`CriticWarmup.updates`={updates} and `max_updates`={max_updates} leave no wait to make; use 0 or "
                "more, and no less for `max_updates`."
            )
        if min_brier_skill is not None and not min_brier_skill < 1:
            raise InputError(
                f"`CriticWarmup.min_brier_skill`={min_brier_skill} is never reached; use less than 1, such as 0.05."
            )
        if min_auroc is not None and not 0 <= min_auroc <= 1:
            raise InputError(f"`CriticWarmup.min_auroc`={min_auroc} is no share; use 0 to 1, such as 0.6.")
        self.updates = updates
        self.floors = {"critic/brier_skill": min_brier_skill, "critic/auroc": min_auroc}
        self.max_updates = max_updates
        conditions = updates > 0 or min_brier_skill is not None or min_auroc is not None
        self.running = conditions and max_updates > 0

    def observe(self, updates: int, metrics: Mapping[str, Any]) -> None:
        """Decide, after `updates` updates in all and with the last iteration's metrics, whether to wait on."""
        if not self.running:
            return
        reached = all(
            floor is None or float(metrics.get(name, float("-inf"))) >= floor for name, floor in self.floors.items()
        )
        if updates >= self.max_updates or (updates >= self.updates and reached):
            self.running = False
            seen = {name: round(float(metrics[name]), 3) for name in self.floors if name in metrics}
            rank_zero_info(
                f"The critic has warmed up for {updates} updates ({seen}); the policy moves from now on."
            )

    def state_dict(self) -> dict[str, bool]:
        """Whether the wait goes on."""
        return {"running": self.running}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        """Go on where a checkpoint was saved."""
        self.running = state_dict["running"]
