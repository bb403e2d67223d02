"""What torch keeps for each thread or process, to be handed on to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TorchSettings:
    """Device, precision and number of threads of the thread that asked."""

    device: torch.device
    threads: int  # of one operation on the CPU
    default_dtype: torch.dtype
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def here(cls, device: torch.device) -> TorchSettings:
        """Those of this thread, for work on `device`."""
        kind = device.type
        return cls(
            device,
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
        )

    def adopt(self, *, new_process: bool = False) -> None:
        """Give this thread, or this new process, the same but for autocast, which is a context: see `precision`."""
        torch.set_num_threads(self.threads)
        if new_process:  # the default is the whole process's: set in a thread, it may outlast who asked for it
            torch.set_default_dtype(self.default_dtype)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def precision(self) -> torch.autocast:
        """A context with the same autocast."""
        return torch.autocast(self.device.type, self.autocast_dtype, self.autocast)
