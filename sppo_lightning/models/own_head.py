"""Logits as a model's own forward computes them, for heads that are more than an output embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sppo_lightning.models.loading import base_of


class OwnHead:
    """What `model` does above its transformer, whatever that is: its own forward, with the transformer passed by.

    Args:
        model: A transformers causal language model.
        outputs: The class of its transformer's outputs, for its forward to find what it looks for in them.
    """

    def __init__(self, model: nn.Module, outputs: Callable[..., Any]) -> None:
        self.model, self.outputs = model, outputs

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H]` last hidden states to `[n, V]` logits."""
        base = base_of(self.model)
        before = vars(base).get("forward")  # where something has replaced the class's own, as here
        base.forward = lambda *_, **__: self.outputs(last_hidden_state=hidden[None])
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del base.forward
            if before is not None:
                base.forward = before
