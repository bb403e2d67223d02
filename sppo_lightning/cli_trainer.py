"""What Lightning's trainer refuses, and a checkpoint that is none, told in one sentence."""

from __future__ import annotations

import difflib
import pickle
import re
import traceback
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sppo_lightning.checkpoint_search import flaw, looks_like_checkpoint, newest_whole
from sppo_lightning.errors import InputError

_OUR_FOLDER = str(Path(__file__).parent)
_ITS_FOLDER = str(Path(lightning.__file__).parent)
UNSAFE = "holds objects beside numbers and text, which may run code when they are loaded"
_BY_WORD = ("best", "last", "hpc")  # checkpoints that Lightning finds by itself


@contextmanager
def told_in_one_sentence(accelerator: Any = None) -> Iterator[None]:
    """Raise `InputError` for what Lightning refuses on its own account; whatever else is raised passes.

    `accelerator` is the trainer's setting, which Lightning's message may leave out.
    """
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # of a checkpoint that Lightning found by itself
        raise InputError(f"The checkpoint {UNSAFE}; set `--weights_only=false` if you trust it.") from error
    except (MisconfigurationException, ValueError, TypeError, LookupError, ImportError, RuntimeError) as error:
        if not _is_refusal(error):
            raise
        raise InputError(_sentence(str(error.args[0] if error.args else error), accelerator)) from error


def _is_refusal(error: Exception) -> bool:
    """Whether a `raise` of Lightning's is where the error is from, with no code of ours or a user's in between."""
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[0].filename.startswith(_OUR_FOLDER):
        frames.pop(0)
    its_own = all(frame.filename.startswith(_ITS_FOLDER) for frame in frames)
    return bool(frames) and its_own and (frames[-1].line or "").startswith("raise ")


def _sentence(message: str, accelerator: Any) -> str:
    if match := re.match(r"You selected an invalid (accelerator|strategy) name: `\w+='(.*?)'`", message):
        setting, value = match.groups()
        known = {
            "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
            "strategy": ["auto", *StrategyRegistry.available_strategies()],
        }[setting]
        close = difflib.get_close_matches(value, known, n=1)
        way_out = f"the nearest is {close[0]}" if close else f"there are {', '.join(known)}"
        return f"`trainer.{setting}`={value} does not exist; {way_out}."
    if re.search(r"No supported gpu backend found|can not run on your system", message):
        return f"`trainer.accelerator`={accelerator} needs what this machine or its torch lacks; use cpu or auto."
    return f"Lightning refuses this run: {' '.join(message.split()).rstrip('.')}."


def check_checkpoint(name: str, weights_only: bool | None = None) -> None:
    """Raise `InputError` for a `--ckpt_path` that is not there or is no checkpoint of a run.

    Words such as `last`, and paths on another machine, are left to Lightning.
    """
    path = Path(name).expanduser()
    if name in _BY_WORD or re.match(r"\w+:", name):
        return
    check_exists(path, "--ckpt_path")
    if path.is_file() and not is_of_a_run(_contents(path, weights_only)):
        raise InputError(
            f"`--ckpt_path`={name} is not a checkpoint of a run; give a file that ModelCheckpoint wrote, or start "
            "from a model's weights with `--model.policy.pretrained`."
        )


def check_exists(path: Path, setting: str) -> None:
    """Raise `InputError` where there is neither a file nor the folder of a sharded checkpoint, or half of one."""
    if not path.exists():
        raise InputError(f"`{setting}`={path} does not exist{_nearest(path)}.")
    if path.is_dir() and not looks_like_checkpoint(path):
        raise InputError(f"`{setting}`={path} is a folder, not a checkpoint{_newest(path)}.")
    if looks_like_checkpoint(path) and (lack := flaw(path)):
        whole, _ = newest_whole(path.parent)
        way_out = f"the newest whole one beside it is {whole}" if whole else "there is no whole one beside it"
        raise InputError(f"`{setting}`={path} is torn ({lack}); {way_out}.")


def is_of_a_run(contents: Collection[str]) -> bool:
    """Whether a file with this in its outermost mapping is a checkpoint of Lightning's."""
    return "pytorch-lightning_version" in contents


def _nearest(path: Path) -> str:
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.ckpt")], n=1)
    return f"; the nearest is {path.parent / close[0]}" if close else "; check its path"


def _newest(folder: Path) -> str:
    there = sorted(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    return f"; the newest in it is {there[-1]}" if there else "; check its path"


def _contents(path: Path, weights_only: bool | None) -> Collection[str]:
    """The names in the file's outermost mapping; none for a file that torch did not write."""
    try:
        # without the numbers: a checkpoint may be larger than the memory
        return read_checkpoint(path, "meta", weights_only=weights_only is not False)
    except pickle.UnpicklingError as error:
        raise InputError(f"`--ckpt_path`={path} {UNSAFE}; set `--weights_only=false` if you trust it.") from error


def read_checkpoint(path: Path, device: str, weights_only: bool = True) -> dict[str, Any]:
    """What the file holds, tensors mapped from the disk; nothing for a file that torch did not write.

    Raises:
        UnpicklingError: It holds what may run code, see `UNSAFE`.
    """
    if not zipfile.is_zipfile(path):
        return {}
    try:
        found: Any = torch.load(path, map_location=device, mmap=True, weights_only=weights_only)
    except RuntimeError:  # some other archive
        return {}
    return found if isinstance(found, dict) else {}
