"""What is told in one sentence, whoever raised it: all that fails before the first batch, full disks, full memory.

A traceback is for who can mend code. So it is shown for whatever is raised once the run has begun, and wherever
a file that is neither this package's nor an installed one has a part in it. Before that, what torch, transformers
or datasets raise says that they cannot work with the settings, and memory and disks end at any time: then the user
reads one sentence, which names a file with the traceback.
"""

from __future__ import annotations

import errno
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.multiprocessing import ProcessRaisedException

from sppo_lightning.errors import InputError, shortened
from sppo_lightning.masking import masked_text
from sppo_lightning.memory import is_out_of_memory

_OUR_FOLDER = str(Path(__file__).parent)
_INSTALLED = tuple({_OUR_FOLDER, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<"})
_STORAGE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR}
_STORAGE |= {errno.EPERM, errno.EROFS}


@contextmanager
def failures_told(command: Any) -> Iterator[None]:
    """Raise `InputError` for what the module's docstring says; `command` has the `config`, once it is parsed."""
    try:
        yield
    except InputError:
        raise
    except ProcessRaisedException as error:  # of a rank that this process has started
        *_, last = str(error).rstrip().split("\n")
        name = f"{InputError.__module__}.{InputError.__qualname__}: "
        if not last.startswith(name):
            raise
        raise InputError(last.removeprefix(name)) from error
    except Exception as error:
        told = _sentence(error, getattr(command, "config", None))
        if told is None:
            raise
        raise InputError(f"{told}; {_kept(error)}.") from error


def _sentence(error: Exception, config: Any) -> str | None:
    frames = list(traceback.walk_tb(error.__traceback__))
    files = [frame.f_code.co_filename for frame, _ in frames]
    if not all(file.startswith(_INSTALLED) or "-packages/" in file for file in files):
        return None
    reason = f"{type(error).__name__}: {shortened(str(error).split(chr(10))[0])}".rstrip(".:")
    where = _where(error.__traceback__, config)
    if is_out_of_memory(error):
        return f"There is not enough memory for {where or 'this run'}; lower its sizes"
    if isinstance(error, OSError) and error.errno in _STORAGE:
        name = "" if error.filename is None else f" {error.filename}"
        return f"A file cannot be written or read:{name} ({error.strerror}); mend that, or choose another place"
    if any(frame.f_code.co_name == "_run_stage" for frame, _ in frames):  # Lightning's, from the first batch on
        return None
    return f"{where or 'This run'} cannot work as it is set ({reason}); correct its settings"


def _where(trace: TracebackType | None, config: Any) -> str | None:
    """The component in whose methods it happened, with its place in the config."""
    places = dict(_places(config.as_dict() if hasattr(config, "as_dict") else {}))
    owners = [type(frame.f_locals.get("self")).__name__ for frame, _ in traceback.walk_tb(trace)]
    found = [f"`{places[owner]}` ({owner})" for owner in owners if owner in places]
    return found[-1] if found else None


def _places(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Names of the components' classes, and where they stand."""
    if isinstance(node, list):
        for item in node:
            yield from _places(item, place)
    elif isinstance(node, Mapping):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"].rpartition(".")[2], place
        for key, value in node.items():
            inner = (
                place if key in ("init_args", "fit", "validate", "test", "predict") else f"{place}.{key}".strip(".")
            )
            yield from _places(value, inner)


def _kept(error: Exception) -> str:
    """Where the traceback is."""
    text = masked_text("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sppo_lightning_", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError as problem:
        return f"its traceback could not be kept ({problem.strerror})"
    return f"the traceback is in {file.name}"
