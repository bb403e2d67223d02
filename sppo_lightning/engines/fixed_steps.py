"""Decoding steps of few shapes, each of which CUDA records once as a graph and plays again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sppo_lightning.engines.slots import SlotCache

_COLUMNS = 256  # the cache's columns that attention looks at are a multiple of it

# The newest tokens [n], their positions [n] and the noise of the next ones [n], over so many columns of the cache,
# to the next tokens [n] and their log-probabilities [n].
Step = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class FixedSteps:
    """Runs steps with their rows rounded up to a power of two, and their columns to a multiple of 256.

    A row more than there are decodes anything into rows of the cache that are free. On CUDA a shape's first step is
    recorded, and the others of that shape cost one launch where there would be some hundreds; elsewhere the shapes
    are all that is fixed.

    Args:
        step: What is run; it must launch the same kernels whatever the numbers are.
        cache: What it reads and writes.
    """

    def __init__(self, step: Step, cache: SlotCache) -> None:
        self.step, self.cache = step, cache
        self.capacity = 0  # of the cache's buffers that graphs know
        self.recorded: dict[tuple[int, int], _Recorded] = {}
        self.records = True  # whether a shape that is new is worth a try
        self.pool: Any = None  # memory of all graphs: what one computes on the way, the next may overwrite

    def __call__(self, newest: Tensor, positions: Tensor, uniforms: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """As `Step`."""
        used = self.cache.used
        rows = min(1 << (used - 1).bit_length(), self.cache.rows)
        columns = -(-width // _COLUMNS) * _COLUMNS
        capacity = self.cache.reserve(columns)
        if capacity != self.capacity:
            self.recorded.clear()  # they write into buffers that are no more
            self.capacity = capacity
        inputs = [torch.nn.functional.pad(each, (0, rows - used)) for each in (newest, positions, uniforms)]
        self.cache.used = rows
        try:
            tokens, log_probs = self._run(inputs, columns)
        finally:
            self.cache.used = used
        return tokens[:used], log_probs[:used]

    def _run(self, inputs: list[Tensor], columns: int) -> tuple[Tensor, Tensor]:
        shape = len(inputs[0]), columns
        if inputs[0].device.type == "cuda" and self.records and shape not in self.recorded:
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.recorded[shape] = _Recorded(self.step, inputs, columns, self.pool)
            except RuntimeError as error:  # something waits for the device, or has no kernel that can be recorded
                self.records = False
                rank_zero_warn(f"HFEngine decodes without CUDA graphs, since they cannot be recorded here: {error}")
        if shape in self.recorded:
            return self.recorded[shape](inputs)
        return self.step(*inputs, columns)  # type: ignore[call-arg, arg-type]


class _Recorded:
    """One step as a CUDA graph, with its inputs and outputs in memory of their own."""

    def __init__(self, step: Step, inputs: list[Tensor], columns: int, pool: Any) -> None:
        self.inputs = [each.clone() for each in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are loaded and weights cast, which cannot be recorded
            step(*self.inputs, columns)  # type: ignore[call-arg, arg-type]
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = step(*self.inputs, columns)  # type: ignore[call-arg, arg-type]

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.outputs
