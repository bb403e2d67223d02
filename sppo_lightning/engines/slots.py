"""A key-value cache of rows that come and go, each at its own position."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy

_FILLED_AT_ONCE = 32


class SlotCache(Cache):
    """Keys and values of up to `rows` sequences, in buffers that grow in place.

    Column `t` of a row holds its token `t`: rows are flush left, so a prompt needs no mask, and a row may be at
    another position than its neighbours. The rows in use are the first `used`; one that goes is overwritten by the
    last, so nothing else is copied. Capacity doubles when it is used up, so that each token is copied a bounded
    number of times.

    Sliding-window layers keep everything too, and their mask does the sliding.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        # a cycle would keep the buffers until Python looks for cycles, with the next iteration's beside them
        super().__init__(layers=[_SlotLayer(weakref.proxy(self)) for _ in range(layers)])
        self.rows = rows
        self.columns = columns  # to begin with
        self.used = 0
        self.copies = 1  # rows that each sequence of a prefill fills
        self.positions: Tensor | None = None  # [used], int64, of the tokens that are decoded; None in a prefill
        self.width = 0  # columns that attention looks at
        self._flat: dict[tuple[int, int], Tensor] = {}  # see `flat`; the same for layers of the same shape

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
        self.positions, self.width, self._flat = positions, width, {}

    def flat(self, capacity: int, heads: int) -> Tensor:
        """`[used · heads]`: where each row's token goes, in a buffer of this capacity as a matrix of vectors."""
        if (capacity, heads) not in self._flat:
            assert self.positions is not None
            first = torch.arange(self.used * heads, device=self.positions.device) * capacity
            self._flat[capacity, heads] = first + self.positions.repeat_interleave(heads)
        return self._flat[capacity, heads]

    def reserve(self, columns: int) -> int:
        """Make room for so many columns of rows that are prefilled; the columns that there is room for."""
        for layer in self.layers:
            layer._grow(columns)  # type: ignore[union-attr]
        return self.layers[0].capacity  # type: ignore[union-attr]

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
                layer.move(former, moved, self.width)  # type: ignore[union-attr]
        self.used = len(order)
        return order


def refuse_other_caches(policy: CausalLMPolicy, engine: str) -> None:
    """Raise `InputError` for a policy that remembers other things than keys and values."""
    if not SlotCache.fits(policy.model.config):
        raise InputError(
            f"`engine`={engine} keeps keys and values for each token, and {type(policy.model).__name__} "
            "remembers in a way of its own; use sppo_lightning.engines.VLLMServerEngine."
        )


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: `[rows, heads, capacity, head size]`."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, empty."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.capacity = self.finite = 0
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def _grow(self, columns: int) -> None:
        """Make room for so many columns, and let all of them hold numbers: a mask does not hide what is none."""
        assert self.keys is not None
        assert self.values is not None
        if columns > self.capacity:
            # twice as much each time, so that a token is copied a bounded number of times
            capacity = max(columns, 2 * self.capacity, self.cache.columns)
            self.keys, self.values = (self._larger(old, capacity) for old in (self.keys, self.values))
            self.capacity = capacity
        if columns > self.finite:
            until = min(columns + _FILLED_AT_ONCE, self.capacity)
            for buffer in (self.keys, self.values):
                buffer[:, :, self.finite : until] = 0
            self.finite = until

    def _larger(self, old: Tensor, capacity: int) -> Tensor:
        _, heads, _, size = old.shape
        new = old.new_empty(self.cache.rows, heads, capacity, size)
        if self.finite:
            new[:, :, : self.finite] = old[:, :, : self.finite]
        return new

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
        place = cache.flat(self.capacity, self.keys.shape[1])
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            # as rows of one matrix, which is several times as fast as indexing with two tensors
            buffer.view(-1, buffer.shape[3]).index_copy_(0, place, states.reshape(-1, buffer.shape[3]))
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
