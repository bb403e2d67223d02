"""The masks of a forward whose rows are flush left, as each attention implementation wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig


class AttentionMasks:
    """Masks by kind of layer: `full_attention`, or `sliding_attention` with a window.

    A ready mask is taken by transformers as it is, so that nothing is worked out anew in each step.

    Args:
        config: Of the language model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        layers: list[Any] = DynamicCache(config=config).layers
        self.windows: dict[str, int | None] = {
            "sliding_attention" if layer.is_sliding else "full_attention": getattr(layer, "sliding_window", None)
            for layer in layers
        }
        implementation = str(config._attn_implementation)
        self.by_kernel = "flash" in implementation  # whose kernels know causality and windows
        self.always = implementation == "eager"  # which takes no mask for none, where causality would need one

    def prefill(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
        """For prompts of up to `tokens`, padded on the right, so that causal attention needs no more."""
        positions = torch.arange(tokens, device=device)

        def mask(window: int | None) -> Tensor | None:
            is_plain = window is None or window >= tokens
            if self.by_kernel or (is_plain and not self.always):
                return None
            return _added(_visible(positions[None], positions, window), dtype)

        return self._by_kind(mask)

    def decode(self, positions: Tensor, columns: Tensor, alike: bool, dtype: torch.dtype) -> Any:
        """For one token per row at `positions` `[n]`, over the first columns `[width]` of the cache.

        `alike` says that all rows are at the last of these columns.
        """

        def mask(window: int | None) -> Tensor | None:
            if self.by_kernel:
                return (columns <= positions[:, None]).long()
            if alike and (window is None or window >= len(columns)):
                # CUDA's kernels are faster without a mask; on a CPU it takes longer to look for why there is none
                none = columns.device.type != "cpu" and not self.always
                return None if none else positions.new_zeros((1, 1, 1, len(columns)), dtype=dtype)
            return _added(_visible(positions[:, None], columns, window), dtype)

        return self._by_kind(mask)

    def _by_kind(self, mask: Callable[[int | None], Tensor | None]) -> Any:
        made = {kind: mask(window) for kind, window in self.windows.items()}
        return made if len(made) > 1 else next(iter(made.values()))


def _visible(queries: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """`[n, queries, columns]`, bool: which columns the queries at positions `[n, queries]` see."""
    seen = columns <= queries[..., None]
    return seen if window is None else seen & (columns > queries[..., None] - window)


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """`[n, 1, queries, columns]`, a term of the scores: 0 where a token is seen, else the least number."""
    least = torch.finfo(dtype).min
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, least)[:, None]
