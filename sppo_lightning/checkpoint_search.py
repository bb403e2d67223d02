"""Which checkpoints are whole, and the newest of them."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

_META, _INDEX = "meta.pt", ".metadata"  # of a sharded checkpoint: the trainer's state, and what is in which file
_ARCHIVE = b"PK\x03\x04"  # what a file that torch writes begins with


def looks_like_checkpoint(path: Path) -> bool:
    """Whether this is, or was to become, a file or a folder of shards that torch writes."""
    if path.is_dir():
        return any(path.glob("*.distcp")) or any((path / name).exists() for name in (_META, _INDEX))
    with path.open("rb") as file:
        return _ARCHIVE.startswith(file.read(len(_ARCHIVE)))  # or nothing at all, where a machine lost its power


def flaw(path: Path) -> str | None:
    """What a checkpoint, a file or a folder of shards, lacks to be whole; None where nothing is missing.

    Reads it from end to end, once, without running what is pickled in it but a folder's index of shards.
    """
    return _flaw_of_shards(path) if path.is_dir() else _flaw_of_file(path)


def _flaw_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # against the checksums that torch has written
    except zipfile.BadZipFile:
        return "its end is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if damaged is None else f"its part {damaged} is damaged"


def _flaw_of_shards(folder: Path) -> str | None:
    missing = [name for name in (_INDEX, _META) if not (folder / name).is_file()]
    if missing:
        return f"its {missing[0]} is missing"
    if _flaw_of_file(folder / _META):
        return f"its {_META} is damaged"
    try:
        parts = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception:  # damaged pickles raise anything
        return f"its {_INDEX} is damaged"
    ends: dict[str, int] = {}  # bytes that each file must have
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        shard = folder / name
        if not shard.is_file() or shard.stat().st_size < end:
            return f"its {name} is {'cut off' if shard.is_file() else 'missing'}"
    return None


def _is_resumable(path: Path) -> bool:
    """Whether a whole checkpoint holds the optimizer, and so is more than weights."""
    if path.is_dir():
        return True
    with zipfile.ZipFile(path) as archive:
        pickled = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    return any(word == "optimizer_states" for each in pickled for _, word, _ in pickletools.genops(each))


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder by the time that they were written; a link comes before what it leads to."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob("*.ckpt") if path.exists()]
    return sorted(found, key=lambda path: (_written(path), path.is_symlink()), reverse=True)


def _written(path: Path) -> int:
    inside = path / _META if path.is_dir() else path
    return (inside if inside.exists() else path).stat().st_mtime_ns  # nanoseconds


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that a run can go on from, and the newer torn ones, each with what it lacks."""
    torn: dict[Path, str] = {}
    for path in _newest_first(folder):
        if path.resolve() in torn:
            continue
        if lack := flaw(path):
            torn[path.resolve()] = lack
        elif _is_resumable(path):
            return path, torn
    return None, torn
