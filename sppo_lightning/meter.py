"""Means over micro-batches, updates and ranks, with one collective call per iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Meter:
    """Collects `value × weight` and `weight` by metric name."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Count `value`, a scalar mean over `weight` tokens, sequences or updates."""
        weight = torch.as_tensor(weight, dtype=torch.float64, device=value.device)
        product = torch.where(weight > 0, value.detach().double() * weight, torch.zeros_like(weight))
        self.totals[name] = self.totals.get(name, torch.zeros_like(product)) + product
        self.weights[name] = self.weights.get(name, torch.zeros_like(weight)) + weight

    def add_share(self, name: str, value: Tensor, share: float) -> None:
        """Count `value`, a term of a sum; `share` is 1 / (number of terms), so that whole sums are averaged."""
        self.add(name, value / share, share)

    def join(self, other: Meter) -> None:
        """Count all that `other` has counted."""
        for name in other.totals:
            self.totals[name] = self.totals.get(name, 0.0) + other.totals[name]
            self.weights[name] = self.weights.get(name, 0.0) + other.weights[name]

    def means(self, strategy: Any) -> dict[str, Tensor]:
        """The weighted means over all ranks, which must have met the same names in the same order.

        A name that nothing was counted for is left out.
        """
        if not self.totals:
            return {}
        table = torch.stack([torch.stack(list(self.totals.values())), torch.stack(list(self.weights.values()))])
        totals, weights = strategy.reduce(table, reduce_op="sum")
        counted = (weights > 0).tolist()
        return {name: (totals[i] / weights[i]).float() for i, name in enumerate(self.totals) if counted[i]}
