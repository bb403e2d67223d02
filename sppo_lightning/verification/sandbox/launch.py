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
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sppo_lightning.errors import InputError
from sppo_lightning.verification.sandbox.stage import interpreter, stage

_NOBODY = 65534
_START = "import sppo_sandbox_runner; sppo_sandbox_runner.main()"
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

    def run(self, job: Mapping[str, Any], timeout_seconds: float, at_once: int = 1) -> list[dict[str, Any]]:
        """What the runner says of each case, in order.

        Args:
            job: `kind`, `submission`, `cases` and what else the kind needs; see `runner.py`.
            timeout_seconds: Wall-clock time of all cases together, from when the interpreter is ready.
            at_once: Cases side by side.

        Raises:
            SandboxFailure: Where it did not start, or said nothing that can be understood.
        """
        limits = {"timeout_seconds": timeout_seconds, "memory_bytes": self.memory_bytes, "at_once": at_once}
        text = json.dumps({**job, **limits}).encode()
        with contextlib.ExitStack() as files:
            given = files.enter_context(os.fdopen(os.memfd_create("job"), "wb+"))
            given.write(text)
            given.seek(0)
            errors = files.enter_context(os.fdopen(os.memfd_create("errors"), "wb+"))
            info, told = os.pipe()
            files.callback(os.close, info)
            try:
                process = self._start(given, errors, told)
            finally:
                os.close(told)
            watch = _Watch(process, info)
            lines = watch.lines(timeout_seconds)
            errors.seek(0)
            said = errors.read(2000).decode("utf-8", "replace").strip()
        if not lines or json.loads(lines[0]) != {"ready": True}:
            raise SandboxFailure(said or f"the sandbox did not start; status {process.returncode}")
        found = {entry["case"]: entry for entry in map(json.loads, lines[1:])}
        lost = {"seconds": 0.0, "status": "output" if len(watch.said) > REPORT_BYTES else "timeout"}
        return [found.get(number, lost) for number in range(len(job["cases"]))]

    def _start(self, given: Any, errors: Any, told: int) -> subprocess.Popen[bytes]:
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
            options |= {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        return subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, **options
        )

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


class _Watch:
    """Reads what a sandbox says, and ends it when its time is up."""

    def __init__(self, process: subprocess.Popen[bytes], info: int) -> None:
        self.process = process
        self.info = info
        self.said = bytearray()

    def lines(self, timeout_seconds: float) -> list[bytes]:
        """Its lines, until it ends or its time is up; it is gone afterwards."""
        pipe = self.process.stdout
        assert pipe is not None
        deadline, ready = time.monotonic() + START_SECONDS, False
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(pipe, selectors.EVENT_READ)
                while (left := deadline - time.monotonic()) > 0 and len(self.said) <= REPORT_BYTES:
                    if not selector.select(left):
                        break
                    chunk = os.read(pipe.fileno(), 1 << 20)
                    if not chunk:
                        break
                    self.said += chunk
                    if not ready and b"\n" in self.said:
                        ready, deadline = True, time.monotonic() + timeout_seconds + GRACE_SECONDS
        finally:
            self._end()
        *whole, _ = bytes(self.said).split(b"\n")  # the last is empty, or cut off
        return whole

    def _end(self) -> None:
        """Kill what is left, from its first process on, and reap it: no zombie and no orphan stays."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.05 if self.said else 0)
            return
        # with the namespace's first process all of it dies, and bubblewrap reaps it; killed itself, it could not
        first = self._first_process()
        for kill, process in ((os.kill, first), (os.killpg, self.process.pid)):
            if process is not None and self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(2.0)

    def _first_process(self) -> int | None:
        os.set_blocking(self.info, False)
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(json.loads(os.read(self.info, 4096))["child-pid"])
        return None
