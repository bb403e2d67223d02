"""A key-value cache of rows that come and go, each at its own position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

_LEAST_CAPACITY = 64  # columns


class SlotCache(Cache):
    """Keys and values of up to `rows` sequences, in buffers that grow in place.

    Column `t` of a row holds its token `t`: rows are flush left, so a prompt needs no mask, and a row may be at
    another position than its neighbours. The rows in use are the first `used`; one that goes is overwritten by the
    last, so nothing else is copied. Capacity doubles when it is used up, so that each token is copied a bounded
    number of times.

    Sliding-window layers keep everything too, and their mask does the sliding.
    """

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
        self.rows = rows
        self.used = 0
        self.copies = 1  # rows that each sequence of a prefill fills
        self.positions: Tensor | None = None  # [used], int64, of the tokens that are decoded; None in a prefill
        self.width = 0  # columns that attention looks at
        self.index: Tensor | None = None  # [used], int64: 0, 1, 2 …

    @staticmethod
    def fits(config: PreTrainedConfig) -> bool:
        """Whether all that the model caches is keys and values, one of each per token."""
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in plain for layer in DynamicCache(config=config).layers)

    def admit(self, copies: int) -> None:
        """The next forward is a prefill, flush left; each of its rows fills `copies` rows behind those in use."""
        self.positions, self.copies = None, copies

    def decode_at(self, positions: Tensor, width: int) -> None:
        """The next forward is of one token per row in use, at `positions` `[used]`, all below `width`."""
        self.positions, self.width = positions, width
        if self.index is None or len(self.index) != self.used:
            self.index = torch.arange(self.used, device=positions.device)

    def drop(self, rows: list[int]) -> list[int]:
        """Let rows go; the others' former numbers, in their new order."""
        order = list(range(self.used))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        moved = [row for row, former in enumerate(order) if row != former]
        if moved:
            former = [order[row] for row in moved]
            for layer in self.layers:
                layer.move(former, moved, self.width)  # type: ignore[attr-defined]
        self.used = len(order)
        return order


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: `[rows, heads, capacity, head size]`."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, empty."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states, _LEAST_CAPACITY)
        self.values = self._buffer(value_states, _LEAST_CAPACITY)
        self.is_initialized = True

    def _buffer(self, like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros(self.cache.rows, like.shape[1], capacity, like.shape[3])

    def _grow(self, columns: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        capacity = self.keys.shape[2]
        if columns <= capacity:
            return
        wanted = max(columns, 2 * capacity)
        used = self.cache.used
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = self._buffer(old, wanted)
            new[:used, :, :capacity] = old[:used]
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[n, heads, tokens, head size]`; what attention is to look at."""
        cache = self.cache
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if cache.positions is None:
            return self._prefill(key_states, value_states)
        self._grow(cache.width)
        assert self.keys is not None
        assert self.values is not None
        self.keys[cache.index, :, cache.positions] = key_states[:, :, 0]
        self.values[cache.index, :, cache.positions] = value_states[:, :, 0]
        return self.keys[: cache.used, :, : cache.width], self.values[: cache.used, :, : cache.width]

    def _prefill(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        rows, _, tokens, _ = key_states.shape
        self._grow(tokens)
        first, copies = self.cache.used, self.cache.copies
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            repeated = states if copies == 1 else states.repeat_interleave(copies, 0)
            buffer[first : first + rows * copies, :, :tokens] = repeated
        return key_states, value_states

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy rows over others, as far as anything is in them."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[targets, :, :width] = self.keys[sources, :, :width]
        self.values[targets, :, :width] = self.values[sources, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention looks at, and the first one's position."""
        return (query_length if self.cache.positions is None else self.cache.width), 0

    def get_seq_length(self) -> int:
        """Tokens before those of the next forward."""
        return 0 if self.cache.positions is None else self.cache.width - 1

    def get_max_length(self) -> int:
        """There is none."""
        return -1
