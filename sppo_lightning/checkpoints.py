"""Checkpoint files, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.api import CheckpointException

from sppo_lightning.ranks import gather_objects

_PARTIAL = ".partial"  # ends the name of what is not whole yet


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, has the disk confirm it, and only then gives it its own name.

    So whenever the process or the machine dies, a checkpoint of that name is whole: the new one or the one before.
    It goes to the file as it is pickled, without a second copy in memory. Paths that are no local files are left
    to Lightning.

    Raises:
        OSError: Where it cannot be written (no space, quota, rights); what was there before stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint; what killed runs left half-written beside it is removed."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(place.parent)
        partial = partial_path(place)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            publish(partial, place)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            cause = _disk_error(error)
            if cause is None or cause is error:
                raise
            raise cause from None


def partial_path(path: Path) -> Path:
    """The name, in the same folder, of what becomes `path` when it is whole."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def remove_partial(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder that one run at a time writes to."""
    for left in folder.glob(f".*{_PARTIAL}"):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; no error where there is none."""
    if _is_folder(path):
        for each in path.iterdir():
            remove(each)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a file, a link or a folder that is whole its own name, when all of it is on the disk."""
    if not partial.is_symlink():
        for written in [*partial.iterdir(), partial] if partial.is_dir() else [partial]:
            _sync(written)
    if _is_folder(path) or (_is_folder(partial) and path.is_symlink()):  # no folder is replaced in one step
        before = path.with_name(f"{path.stem}-before{path.suffix}")  # a name by which it is found
        remove(before)
        path.rename(before)
        partial.rename(path)
        remove(before)
    else:
        partial.replace(path)
    _sync(path.parent)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the disk behind one of torch, which may say no more than where in the file it happened."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


class NotSaved(Exception):
    """A checkpoint that some rank could not write; raised on all of them."""


def together(work: Callable[[], None] | None, path: str) -> None:
    """Do what writes part of a checkpoint, and go on when all ranks have: a collective.

    Raises:
        NotSaved: On every rank, where the disk of any of them refused; another error is raised where it is.
    """
    reason = None
    try:
        if work is not None:
            work()
    except CheckpointException as failed:  # the same on every rank
        errors = [error for error, _ in failed.failures.values()]
        if not all(_disk_error(error) for error in errors):
            raise
        reason = str(_disk_error(errors[0]))
    except (OSError, RuntimeError) as error:
        if not (_disk_error(error) or "inline_container" in str(error)):  # torch's own writer names no cause
            raise
        reason = str(_disk_error(error) or "torch could not write to the file")
    if reasons := [each for each in gather_objects(reason) if each]:
        raise NotSaved(f"{path} could not be written ({reasons[0]})")


def write_together(strategy: Strategy, checkpoint: dict[str, Any], filepath: str) -> None:
    """Write a checkpoint, in shards if the strategy does so: whole, or not at all; a collective.

    Raises:
        NotSaved: Where it cannot be written.
    """
    if not getattr(strategy, "_save_distributed_checkpoint", False):  # then the strategy uses the CheckpointIO
        together(lambda: strategy.save_checkpoint(checkpoint, filepath), filepath)
        return
    path = Path(filepath)
    partial, first = partial_path(path), strategy.is_global_zero
    together((lambda: remove_partial(path.parent)) if first else None, filepath)
    try:
        together(lambda: strategy.save_checkpoint(checkpoint, partial), filepath)
        together((lambda: publish(partial, path)) if first else None, filepath)
    except NotSaved:
        if first:
            remove(partial)
        raise
