"""Sums and means that masked positions do not reach."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # further off a ratio says nothing more, and exp() overflows float32 near 88
EPS = 1e-8  # keeps means over no tokens at 0


def check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    """Raise `ValueError` for a value that is not one of `options`."""
    if value not in options:
        raise ValueError(f"`{name}`={value!r} is unknown; use one of {', '.join(map(repr, options))}.")


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, and zeros where the mask is zero; a product would let NaN through."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def divide(total: Tensor, denominator: float | Tensor, eps: float = 0.0) -> Tensor:
    """`total / (denominator + eps)`, or the total (then an empty sum) where there is nothing to divide by."""
    below = torch.as_tensor(denominator, dtype=total.dtype, device=total.device) + eps
    return total / torch.where(below == 0, 1.0, below)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the tokens of the mask; 0 for none."""
    return divide(keep(values, mask).sum(), mask.bool().sum(), EPS)
