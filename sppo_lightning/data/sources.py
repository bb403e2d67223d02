"""Where prompts come from: a source gives raw rows, and a layout says how to read them."""

from __future__ import annotations

import glob
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from sppo_lightning.errors import InputError, nearest, readable_path, shortened

Split = TypeVar("Split")
Row = Mapping[str, Any]  # column → value, as the file gives it


class PromptSource(ABC):
    """Raw rows, and the layout they are read with.

    A subclass writes `origin` and `rows`, and sets `layout` (and `columns`) where "auto" would not do, and `suffix`
    where its prompts need another one than the rest of the data.
    """

    layout: str = "auto"  # a name from `sppo_lightning.data.layouts.LAYOUTS`, or "auto": told by the columns
    columns: Mapping[str, str] | None = None  # "prompt", "answer" or "demonstration" → the rows' own name
    suffix: str | None = None  # appended to the last user turn, instead of the data module's
    rendered: bool = False  # whether prompts are what the policy reads: no template, suffix or system prompt

    @property
    @abstractmethod
    def origin(self) -> str:
        """What error messages call this source, for instance the path of its file."""

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """The rows in their order, the same at every call; a row's number is its position, from 0."""


class PromptFile(PromptSource):
    """Rows of a local file or folder, or of a data set on the Hugging Face hub.

    Args:
        path: A .parquet, .jsonl, .json or .csv file, a glob that matches several of one set, a folder that
            holds one file (or numbered shards) per split, or a hub id such as `openai/gsm8k`.
        split: Which split of a folder or hub id to read; it may be left out where there is only one.
        layout: How rows are read: `messages`, `prompt_answer`, `gsm8k`, `trl` or `chat`; `auto` tells by the
            columns.
        columns: Names for data in no known layout, as in `{prompt: problem, answer: meta.gold}`: the keys are
            `prompt`, `answer` and `demonstration`, the values columns, with dots to reach into nested ones.
        limit: Read only this many rows, from the first on; all of them if left out.
        subset: Which configuration of a hub id to read, where it has several (`main` for `openai/gsm8k`).
        revision: Which commit, branch or tag of a hub id to read; the newest if left out.
        suffix: Appended as it stands to the last user turn of each prompt, instead of the data's own `suffix`;
            "" appends nothing.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        layout: str = "auto",
        columns: dict[str, str] | None = None,
        limit: int | None = None,
        subset: str | None = None,
        revision: str | None = None,
        suffix: str | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"`limit`={limit} of {path} leaves no row; use 1 or more, or leave it out.")
        self.path = path
        self.split = split
        self.layout = layout
        self.columns = columns
        self.limit = limit
        self.subset = subset
        self.revision = revision
        self.suffix = suffix

    @property
    def origin(self) -> str:
        """The path, and the split where one is set."""
        return self.path if self.split is None else f"{self.path} (split {self.split})"

    def rows(self) -> Iterable[Row]:
        """The rows of all matching files, one file after the other.

        Raises:
            InputError: For a path or split that does not exist, and for a file that cannot be read.
        """
        if not self.path.strip():
            raise InputError("`path` is empty; give a file, a folder or a hub id.")
        path = readable_path(self.path, "path")
        if is_hub_id(self.path):
            rows = _hub_rows(self.path, self.split, self.subset, self.revision)
        else:
            rows = chain.from_iterable(map(_file_rows, _files_of(path, self.split)))
        return islice(rows, None if self.limit is None else min(self.limit, sys.maxsize))


def _file_rows(path: Path) -> Iterable[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"`path`={path} has an ending that is not read; use one of {', '.join(_READERS)}.")
    try:
        return reader(path)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pyarrow, pandas and json have many kinds for a damaged file
        reason = str(error).split("\n")[0].split(";")[0].rstrip(".")
        raise InputError(f"`path`={path} cannot be read as {path.suffix}: {reason}.") from error


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _csv_rows(path: Path) -> list[Row]:
    import pandas

    # as text, so that a gold answer such as 007 or 3.10 stays what it is
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _json_lines(path: Path) -> list[Row]:
    # the standard library, because pyarrow refuses a column that is a number in one row and text in another
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                reason = str(error).split(";")[0]  # behind it, what a programmer could do
                raise InputError(f"`path`={path} is not JSON in line {number}: {reason}.") from error
            if not isinstance(rows[-1], dict):
                raise InputError(f"`path`={path} holds no JSON object in line {number}: {line.strip()[:40]}.")
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        return _json_lines(path)  # JSON lines are often named .json
    if isinstance(rows, dict):
        rows = [rows]
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"`path`={path} does not hold a list of JSON objects; write one object per row.")
    return rows


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
}


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be a hub id: `name` or `owner/name`, and nothing on this disk."""
    shaped = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
    return shaped and Path(path).suffix not in _READERS and not Path(path).exists()


def _files_of(path: Path, split: str | None) -> list[Path]:
    """The files that `path` (a file, a folder or a glob) stands for, in the order of their names."""
    if path.is_dir():
        return _files_of_folder(path, split)
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise InputError(_missing(path))
    _choose({"train": files}, split, str(path))  # as in `datasets`: a file alone is a `train` split
    return files


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in _READERS and file.is_file():
            splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    if not splits:
        raise InputError(f"`path`={folder} is a folder without {', '.join(_READERS)} files.")
    return _choose(splits, split, str(folder))


def _choose(splits: Mapping[str, Split], split: str | None, path: str) -> Split:
    """The split that is asked for, or the only one."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise InputError(
            f"`path`={path} has the splits {shortened(', '.join(splits))}; set `split` to one of them."
        )
    if split not in splits:
        raise InputError(f"`split`={split} is not in {path}, which has {shortened(', '.join(splits))}.")
    return splits[split]


def _missing(path: Path) -> str:
    folder = next(parent for parent in path.parents if parent.exists())
    if folder != path.parent:
        return f"`path`={path} does not exist: there is no such folder in {folder.resolve()}."
    names: Sequence[str] = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _READERS)
    others = nearest(path.name, names) or (f", which has {', '.join(names[:3])}" if names else "")
    return f"`path`={path} does not exist in {folder.resolve()}{others}."


def _hub_rows(path: str, split: str | None, subset: str | None, revision: str | None) -> Iterable[Row]:
    import datasets

    try:
        splits = datasets.load_dataset(path, subset, revision=revision)
    except (OSError, ValueError) as error:  # not found, offline, or a `subset` missing or unknown
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"`path`={path} is no file here and cannot be loaded from the hub: {reason}; "
            "check its name, its `subset` and the connection."
        ) from error
    return _choose(splits, split, path)
