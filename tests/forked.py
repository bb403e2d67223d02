"""Work on several ranks, each a process of its own, as `torchrun` would start them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from sppo_lightning.errors import InputError
from sppo_lightning.ranks import gather_objects


def on_ranks(
    ranks: int,
    folder: Path,
    work: Callable[..., Any],
    *arguments: Any,
    start_method: str = "fork",
    **settings: Any,
) -> list[Any]:
    """What `work(*arguments, **settings)` returns on each rank; `folder` is where they leave it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everything = (ranks, port, folder, work, arguments, settings)
    mp.start_processes(_rank, everything, nprocs=ranks, start_method=start_method)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


class WritesDown:
    """Of a callback: what a rank refuses, in a file of its own, before the first to refuse ends the others."""

    folder: Path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            super().on_train_start(trainer, pl_module)  # type: ignore[misc]
        except InputError as error:
            (self.folder / f"{trainer.global_rank}").write_text(str(error))
            gather_objects(None)
            raise


def _rank(
    rank: int, ranks: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any, settings: Any
) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.save(work(*arguments, **settings), folder / f"rank{rank}.pt")
