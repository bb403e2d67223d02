"""The file system that submissions see: an interpreter, its libraries, and nothing else."""

from __future__ import annotations

import compileall
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
    name = f"sppo-sandbox-{os.geteuid()}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    final = Path(tempfile.gettempdir()) / name
    if not final.exists():
        draft = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        try:
            _fill(draft, sources)
            draft.rename(final)
        except OSError:
            if not final.exists():  # or another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    info = final.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise InputError(f"{final} belongs to somebody else, or others may write to it; remove it.")
    return final


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
    compileall.compile_dir(_inside(root, library), maxlevels=0, quiet=2, legacy=False)
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
