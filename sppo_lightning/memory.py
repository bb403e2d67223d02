"""How much memory the process has needed at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> dict[str, float]:
    """Peaks since the process started, in MB (2²⁰ bytes).

    Returns:
        `peak_mb`, main memory; where the process uses CUDA also `gpu_peak_mb`, what tensors took on the current
        device, and `gpu_reserved_mb`, what torch held there for them.
    """
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peaks = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_initialized():
        peaks["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        peaks["gpu_reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20
    return peaks
