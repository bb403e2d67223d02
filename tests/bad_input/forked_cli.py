"""The command line in a child process, with limits on its time and memory; the parent has everything imported."""

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import constants

from sppo_lightning.cli import main

MEMORY = 6 * 2**30  # bytes of address space


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int | None  # None where its time ran out, negative where a signal ended it
    said: str  # on stderr

    @property
    def sentence(self) -> str | None:
        """The last line of stderr without `error: `; None where it is no such line."""
        last = self.said.rstrip("\n").split("\n")[-1]
        return last.removeprefix("error: ") if last.startswith("error: ") else None


def run(arguments: Sequence[str], folder: Path, seconds: float = 60.0) -> Outcome:
    """Run the command line in `folder`; what it leaves running dies with it."""
    said = folder / "stderr.txt"
    child = os.fork()
    if child == 0:
        _become(arguments, folder, said)
    end = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if found else None
        time.sleep(0.005)
    for kill in (os.killpg, os.kill) if status is None else (os.killpg,):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return Outcome(status, said.read_text(errors="replace"))


def _become(arguments: Sequence[str], folder: Path, said: Path) -> None:
    """Be the command and end this process."""
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for path, number in ((folder / "stdout.txt", 1), (said, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
        sys.argv = ["sppo_lightning"]
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        os.chdir(folder)
        main(list(arguments))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
