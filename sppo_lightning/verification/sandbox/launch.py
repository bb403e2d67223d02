"""Starts a sandbox for each submission, watches it from outside, and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sppo_lightning.errors import InputError
from sppo_lightning.verification.sandbox.spares import Spares
from sppo_lightning.verification.sandbox.stage import interpreter, stage

_NOBODY = 65534
_START = "import gc; gc.disable(); import sppo_sandbox_runner; sppo_sandbox_runner.main()"
START_SECONDS = 10.0  # to be ready, on a busy machine
GRACE_SECONDS = 0.5  # for the runner to report what has timed out
REPORT_BYTES = 64_000_000  # of all cases
TMP_BYTES = 16 * 1024**2


class SandboxFailure(RuntimeError):
    """The sandbox failed, and not what ran in it."""


class Sandbox:
    """Runs jobs of `runner.py`, each in a bubblewrap sandbox of its own.

    Args:
        memory_mb: Address space of a case.
        unsafe_no_sandbox: Run without bubblewrap, with the limits and the filter of system calls alone.
    """

    def __init__(self, memory_mb: int = 512, unsafe_no_sandbox: bool = False) -> None:
        self.memory_bytes = memory_mb * 1024**2
        self.unsafe_no_sandbox = unsafe_no_sandbox
        self._spares: Spares[Started] | None = None

    def run(self, job: Mapping[str, Any], timeout_seconds: float, at_once: int = 1) -> list[dict[str, Any]]:
        """What the runner says of each case, in order.

        Args:
            job: `kind`, `submission`, `cases` and what else the kind needs; see `runner.py`.
            timeout_seconds: Wall-clock time of all cases together, from when the interpreter has read the job.
            at_once: Cases side by side.

        Raises:
            SandboxFailure: Where it did not start, or said nothing that can be understood.
        """
        limits = {"timeout_seconds": timeout_seconds, "memory_bytes": self.memory_bytes, "at_once": at_once}
        text = json.dumps({**job, **limits}).encode()
        started = (self._spares.take() if self._spares else None) or self.start()
        lines, said = started.run(text, timeout_seconds)
        if [json.loads(line) for line in lines[:2]] != [{"ready": True}, {"started": True}]:
            raise SandboxFailure(said or f"the sandbox did not start; status {started.process.returncode}")
        found = {entry["case"]: entry for entry in map(json.loads, lines[2:])}
        lost = {"seconds": 0.0, "status": "output" if len(started.said) > REPORT_BYTES else "timeout"}
        return [found.get(number, lost) for number in range(len(job["cases"]))]

    @contextlib.contextmanager
    def warm(self, runs: int, spare: int) -> Iterator[None]:
        """Start sandboxes ahead, for so many runs, while others run; none is left at the end, none is used twice.

        Args:
            runs: How many calls of `run` are to come.
            spare: How many sandboxes may wait, ready, at a time.
        """
        spares = Spares(self.start, Started.end, runs, spare)
        self._spares = spares
        try:
            yield
        finally:
            self._spares = None
            spares.close()

    def start(self) -> Started:
        """A sandbox that will wait for its job; it ends with the thread that starts it."""
        with contextlib.ExitStack() as files:
            errors = files.enter_context(os.fdopen(os.memfd_create("errors"), "wb+"))
            info, told = os.pipe()
            files.callback(os.close, info)
            try:
                process = self._start(errors, told)
            finally:
                os.close(told)
            return Started(process, errors, info, files.pop_all())

    def _start(self, errors: Any, told: int) -> subprocess.Popen[bytes]:
        command = [str(interpreter()), "-I", "-S", "-c", _START]
        options: dict[str, Any] = {"env": {}, "cwd": "/"}
        if self.unsafe_no_sandbox:  # the copy, since an unprivileged user may not reach the original
            command = [str(self._root) + command[0], "-s", "-S", "-c", _START]
            options["env"] = {
                "PYTHONHOME": f"{self._root}{sys.base_prefix}",
                "LD_LIBRARY_PATH": f"{self._root}{sys.base_prefix}/lib",
            }
        else:
            command = [*self._bubblewrap, "--info-fd", str(told), *command]
            options["pass_fds"] = [told]
        if os.geteuid() == 0:  # limits on processes do not bind root
            if self._drop:
                command = [*self._drop, *command]
            else:
                options |= {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True, **options)

    @cached_property
    def _drop(self) -> list[str]:
        """The program that drops root's privileges, where there is one; Python would have to copy this process.

        Copying a trainer's memory map takes longer than all the rest of a start; without `user` Python need not.
        """
        program = shutil.which("setpriv")
        users = ("--reuid", str(_NOBODY), "--regid", str(_NOBODY), "--clear-groups")
        return [program, *users] if program else []

    @cached_property
    def _root(self) -> Path:
        return stage()

    @cached_property
    def _bubblewrap(self) -> list[str]:
        program = shutil.which("bwrap")
        if program is None:
            raise InputError(
                "Submitted code runs in bubblewrap, which is not installed; install it (Debian and Ubuntu: "
                "`apt install bubblewrap`)."
            )
        return [
            *(program, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(_NOBODY)),
            *("--gid", str(_NOBODY), "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
            "--clearenv",
            *("--ro-bind", str(self._root), "/", "--dev-bind", "/dev/null", "/dev/null"),
            *("--dev-bind", "/dev/urandom", "/dev/urandom", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"),  # noqa: S108
            *("--remount-ro", "/", "--chdir", "/tmp", "--hostname", "sandbox"),  # noqa: S108
        ]


class Started:
    """A sandbox that has been started, for one job."""

    def __init__(
        self, process: subprocess.Popen[bytes], errors: Any, info: int, files: contextlib.ExitStack
    ) -> None:
        self.process = process
        self.errors = errors
        self.info = info
        self.files = files  # to be closed at the end
        self.said = bytearray()

    def run(self, job: bytes, timeout_seconds: float) -> tuple[list[bytes], str]:
        """What it says, line by line until it ends or its time is up, and its complaints; it is gone afterwards."""
        try:
            self._watch(len(job).to_bytes(8, "big") + job, timeout_seconds)
        finally:
            complaints = self.end()
        *whole, _ = bytes(self.said).split(b"\n")  # the last is empty, or cut off
        return whole, complaints

    def _watch(self, given: bytes, timeout_seconds: float) -> None:
        pipe, job_pipe = self.process.stdout, self.process.stdin
        assert pipe is not None
        assert job_pipe is not None
        os.set_blocking(job_pipe.fileno(), False)
        deadline, started = time.monotonic() + START_SECONDS, False
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(job_pipe, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0 and len(self.said) <= REPORT_BYTES:
                ready = {key.fileobj for key, _ in selector.select(left)}
                if job_pipe in ready:
                    with contextlib.suppress(BlockingIOError):
                        try:
                            given = given[os.write(job_pipe.fileno(), given[:65536]) :]
                        except BrokenPipeError:  # it has ended, which reading tells
                            given = b""
                    if not given:
                        selector.unregister(job_pipe)
                if pipe in ready:
                    chunk = os.read(pipe.fileno(), 1 << 20)
                    if not chunk:
                        break
                    self.said += chunk
                    if not started and self.said.count(b"\n") >= 2:
                        started, deadline = True, time.monotonic() + timeout_seconds + GRACE_SECONDS

    def end(self) -> str:
        """Kill what is left, from its first process on, and reap it: no zombie and no orphan stays."""
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.process.stdout.close()
        self.process.stdin.close()  # for one that still waits for its job, that it is not wanted
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05 if self.said else 0)
            # with its first process all of a namespace dies, and bubblewrap reaps it; killed itself, it could not
            for kill, process in ((os.kill, self._first_process()), (os.killpg, self.process.pid)):
                if process is not None and self.process.poll() is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        kill(process, signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(2.0)
            self.errors.seek(0)
            return self.errors.read(2000).decode("utf-8", "replace").strip()
        finally:
            self.files.close()

    def _first_process(self) -> int | None:
        os.set_blocking(self.info, False)
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads(os.read(self.info, 4096))["child-pid"])
        return None
