"""Attention of one token per row, for CPUs: two batched matrix products, which read the cache once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sppo_decode"
_MOST_COLUMNS = 1024  # beyond, the fused kernel has caught up


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as transformers' `sdpa`, of which torch's kernel for CPUs takes up to twice as long here.

    Args:
        module: The attention layer.
        query: `[n, heads, 1, d]`; more tokens, and other devices, go to `sdpa`.
        key: `[n, key-value heads, columns, d]`.
        value: As `key`.
        attention_mask: `[n, 1, 1, columns]`, a term that is added to the scores, or None.
        scaling: Of the scores; `d ** -0.5` if None.
        **kwargs: As `sdpa` takes them.

    Returns:
        `[n, 1, heads, d]`.
    """
    rows, heads, tokens, size = query.shape
    if tokens > 1 or key.shape[2] > _MOST_COLUMNS or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)  # heads that share keys and values
    scores = torch.matmul(grouped, key.transpose(2, 3))
    scaling = size**-0.5 if scaling is None else scaling
    scores = scores.mul_(scaling) if attention_mask is None else torch.add(attention_mask, scores, alpha=scaling)
    attended = torch.matmul(scores.softmax(dim=-1), value)
    return attended.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(_NAME, decode_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def decode_attention_in(model: nn.Module) -> Iterator[None]:
    """Let a transformers model use `decode_attention` within, unless its attention is eager or flash."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    own = [(config, str(config._attn_implementation)) for config in configs]
    changed = [(config, name) for config, name in own if name != "eager" and "flash" not in name]
    for config, _ in changed:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name
