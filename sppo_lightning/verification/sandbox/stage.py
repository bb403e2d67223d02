"""The file system that submissions see: an interpreter, its libraries, and nothing else."""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import fnmatch
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from sppo_lightning.errors import InputError

_MODULES = ("runner", "case", "seccomp", "values")  # of this package, what runs inside; named sppo_sandbox_… there
_IMPORTS = {
    "from sppo_lightning.verification.sandbox import seccomp, values": (
        "import sppo_sandbox_seccomp as seccomp, sppo_sandbox_values as values"
    ),
    "from sppo_lightning.verification.sandbox import case as child": "import sppo_sandbox_case as child",
}  # and what they are inside
_LEFT_OUT = (
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"),
    *("lib2to3", "pydoc_data", "config-*", "*.a", "*.opt-?.pyc"),
)


_PREFIX = "sppo-sandbox-"
STALE_SECONDS = 24 * 3600.0
_held: dict[Path, int] = {}  # descriptors of folders in use, locked against removal


def interpreter() -> Path:
    """The interpreter itself, not the link of a virtual environment."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))


def stage() -> Path:
    """A folder to be the root of the sandbox; made once per user and interpreter, and kept in the temporary folder.

    It is a copy, because an unprivileged user cannot reach an interpreter below a closed home folder.

    Raises:
        InputError: Where somebody else could have put something into it.
    """
    sources = [Path(__file__).parent / f"{name}.py" for name in _MODULES]
    content = "\0".join([sys.version, str(interpreter()), *(path.read_text() for path in sources)])
    name = f"{_PREFIX}{os.geteuid()}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    final = Path(tempfile.gettempdir()) / name
    while not _hold(final):
        _make(final, sources)
        _remove_stale(final)
    return final


def _make(final: Path, sources: Iterable[Path]) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f"{final.name}-", dir=final.parent))
    try:
        _fill(draft, sources)
        draft.rename(final)
    except OSError:
        if not final.exists():  # or another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _hold(folder: Path) -> bool:
    """Lock a folder against removal for as long as this process lives; False where it is not there."""
    if folder in _held:
        if folder.exists():
            return True
        os.close(_held.pop(folder))
    try:
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise InputError(f"{folder} belongs to somebody else, or others may write to it; remove it.")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # some file systems have no locks; then age alone protects it
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        if os.path.samestat(folder.lstat(), info):
            os.utime(descriptor)
            _held[folder] = descriptor
            return True
    except FileNotFoundError:  # removed while this waited for the lock
        pass
    os.close(descriptor)
    return False


def _remove_stale(current: Path) -> None:
    """Remove this user's other copies and drafts that nobody holds, and that nobody has taken up for a day."""
    for folder in current.parent.glob(f"{_PREFIX}{os.geteuid()}-*"):
        try:
            info = folder.lstat()
            if folder == current or not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                continue
            if time.time() - info.st_mtime < STALE_SECONDS:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process was faster
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = folder.rename(folder.with_name(f"{folder.name}-removed"))  # at once, for who waits for it
            shutil.rmtree(removed, ignore_errors=True)
        except OSError:  # it is in use
            pass
        finally:
            os.close(descriptor)


def _fill(root: Path, sources: Iterable[Path]) -> None:
    root.chmod(0o755)
    for folder in ("tmp", "dev"):
        (root / folder).mkdir()
    for device in ("null", "urandom"):
        (root / "dev" / device).touch()
    program, paths = interpreter(), sysconfig.get_paths()
    library, extensions = Path(paths["stdlib"]), Path(sysconfig.get_config_var("DESTSHARED") or paths["platstdlib"])
    _copy(program, root)
    shutil.copytree(library, _inside(root, library), ignore=_ignored, symlinks=False)
    if library not in extensions.parents:
        shutil.copytree(extensions, _inside(root, extensions), ignore=_ignored)
    for found in sorted(_libraries([program, *extensions.glob("*.so")])):
        _copy(found, root)
    for path in sources:
        text = path.read_text()
        for outside, inside in _IMPORTS.items():
            text = text.replace(outside, inside)
        (_inside(root, library) / f"sppo_sandbox_{path.stem}.py").write_text(text)
    compileall.compile_dir(_inside(root, library), maxlevels=1, quiet=2, legacy=False)
    for path in root.rglob("*"):  # whatever the umask was
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _LEFT_OUT)}


def _inside(root: Path, path: Path) -> Path:
    """The same absolute path below `root`, so that whatever the interpreter has built in still holds."""
    return root / path.relative_to("/")


def _copy(path: Path, root: Path) -> None:
    target = _inside(root, path)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)  # what a link points to


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries that the programs are linked with."""
    result = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False)
    return {Path(found) for found in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", result.stdout, flags=re.MULTILINE)}
