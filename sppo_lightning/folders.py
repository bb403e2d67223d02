"""Where a run keeps what it writes."""

from __future__ import annotations

import os

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> str:
    """The run's log folder, or its root where it logs nowhere; asked for on every rank."""
    return trainer.log_dir or trainer.default_root_dir


def save_to_go_on_from(trainer: Trainer, name: str, folder: str) -> str:
    """Save a checkpoint beside the run's others, or in `folder` where it saves none; called on every rank.

    Returns:
        Its path, which may be a URL.
    """
    file = os.path.join(getattr(trainer.checkpoint_callback, "dirpath", None) or folder, name)
    trainer.save_checkpoint(file)  # each rank has part of a sharded model
    return file
