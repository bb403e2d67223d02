"""How much memory the process needs, holds and has needed at most."""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> dict[str, float]:
    """Peaks since the process started, or since a `Gauge` began to count, in MB (2²⁰ bytes).

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no memory left, here or on a GPU."""
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


class Gauge:
    """Memory of this process, in bytes: on a GPU what tensors take, else what is resident in main memory.

    Where the system does not tell what is resident now (only Linux does), it is the most that has been.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def held(self) -> int:
        """What is held now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _from_status("VmRSS")

    def start(self) -> int:
        """Let `peak` count from here; what is held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM start anew
        return self.held()

    def peak(self) -> int:
        """The most that was held since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _from_status("VmHWM")

    def total(self) -> int:
        """What this process may hold in all, were the others to stay as they are."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        information = Path("/proc/meminfo")
        if not information.exists():
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 2**10 + self.held()


def _from_status(name: str) -> int:
    """One of Linux's figures on this process, bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return int(peak_memory()["peak_mb"] * 2**20)
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 2**10
