"""Looked at before a run begins: numbers that would crash the process, and folders that cannot be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from sppo_lightning.errors import InputError, readable_path, shortened

_MOST_THREADS = 1024
_FILES = (".parquet", ".jsonl")  # what is written as a file, which may be there; all else are folders
_MOST_SEED = 2**32 - 1  # numpy's


def check_process(threads: int | None, seed: int | bool | None) -> None:
    """Raise `InputError` for a number of threads or a seed that torch or numpy would not survive."""
    if threads is not None and threads < 1:
        raise InputError(f"`threads`={threads} leaves no thread to compute with; use 1 or more.")
    if threads is not None and threads > _MOST_THREADS:
        raise InputError(
            f"`threads`={shortened(threads)} is more than a process can have; use the number of cores."
        )
    if seed is not None and not 0 <= seed <= _MOST_SEED:
        raise InputError(f"`seed_everything`={shortened(seed)} is no seed; use one from 0 to {_MOST_SEED}.")


def check_trainer(trainer: Trainer) -> None:
    """Raise `InputError` for settings of a trainer that would bring the machine, or the run, to its end later."""
    if isinstance(trainer.accelerator, CPUAccelerator):
        cores, asked = os.cpu_count() or 1, trainer.num_devices
        if asked > max(cores, 2):  # two are for trying out
            raise InputError(
                f"`trainer.devices`={asked} is more processes than there are CPU cores here; use {cores} or fewer."
            )
    if trainer.val_check_interval == 0 and trainer.limit_val_batches:
        raise InputError(
            "`trainer.val_check_interval`=0 is no interval; use 1 or more, or set `limit_val_batches` to 0 for no "
            "validation."
        )
    if trainer.is_global_zero:
        for setting, path in _outputs(trainer):
            check_writable(path, setting)


def _outputs(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """What the run writes, each with the name of its setting."""
    yield "trainer.default_root_dir", trainer.default_root_dir
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            yield f"save_dir` of `{type(logger).__name__}", str(logger.save_dir)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for name in ("dirpath", "path"):
            if isinstance(path := getattr(callback, name, None), str | Path):
                yield f"{name}` of `{type(callback).__name__}", str(path)


def check_writable(name: str, setting: str) -> None:
    """Raise `InputError` where no file can be made at the path `name`; it leaves none behind.

    Addresses such as `s3://…` are left to whoever writes there.
    """
    if "://" in name:
        return
    path = readable_path(name, setting)
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        if not there.is_dir():
            if there != path.absolute() or path.suffix not in _FILES:
                raise InputError(
                    f"`{setting}`={shortened(name)} cannot be written: {there} is a file; name a folder."
                )
            there = there.parent
        with tempfile.TemporaryDirectory(prefix=".sppo_lightning_", dir=there) as folder:
            (Path(folder) / "try").write_bytes(bytes(2**16))
    except OSError as error:
        raise InputError(
            f"`{setting}`={shortened(name)} cannot be written ({error.strerror}); choose another folder."
        ) from error
