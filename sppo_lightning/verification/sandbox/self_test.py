"""Whether the sandbox holds on this machine: harmless attempts to get out of it, of which none may succeed."""

from __future__ import annotations

import json
import os
import tempfile

from sppo_lightning.errors import InputError
from sppo_lightning.verification.sandbox.launch import Sandbox, SandboxFailure
from sppo_lightning.verification.sandbox.values import encode

_ATTEMPTS = """
import os, socket

def succeeds(attempt):
    try:
        return bool(attempt())
    except (OSError, AttributeError):
        return False

def canaries(path, process):
    return {
        "read a file": succeeds(lambda: open(path).read()),
        "see the environment": "SPPO_CANARY" in os.environ,
        "open a socket": succeeds(lambda: socket.socket()),
        "write a file": succeeds(lambda: open("/canary", "w")),
        "start a process": succeeds(lambda: os.fork() + 1),
        "run a program": succeeds(lambda: os.execv("/bin/sh", ["sh", "-c", "true"])),
        "see a process": succeeds(lambda: os.path.exists("/proc/%d" % process)),
        "signal a process": succeeds(lambda: os.kill(process, 0) is None),
        "link a file": succeeds(lambda: os.symlink("/", "/tmp/canary") is None),
    }
"""
_ADVICE = (
    "bubblewrap needs user namespaces: on Ubuntu 24.04 and later give bwrap an AppArmor profile that allows "
    "`userns`, in Docker run with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined` (or "
    "profiles that allow unshare, clone and mount), elsewhere set `sysctl user.max_user_namespaces` above 0."
)


def check_sandbox(sandbox: Sandbox) -> None:
    """Try to read, write, connect, fork, and look around from inside.

    Raises:
        InputError: Where the sandbox does not start, or one attempt succeeds.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".canary") as file:
        file.write("here")
        file.flush()
        os.chmod(file.name, 0o644)
        case = {"args": encode([file.name, os.getpid()])}
        job = {"kind": "function", "fn": "canaries", "submission": _ATTEMPTS, "cases": [case]}
        os.environ["SPPO_CANARY"] = "here"
        try:
            (outcome,) = sandbox.run(job, timeout_seconds=10.0)
        except SandboxFailure as error:
            raise InputError(f"The sandbox for submitted code does not start: {error}. {_ADVICE}") from error
        finally:
            del os.environ["SPPO_CANARY"]
    try:
        found = dict(json.loads(outcome["said"])["value"]["dict"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The sandbox for submitted code runs nothing: {outcome}. {_ADVICE}") from error
    escaped = [attempt for attempt, succeeded in found.items() if succeeded]
    if escaped or len(found) != _ATTEMPTS.count("succeeds(lambda") + 1:
        raise InputError(
            f"The sandbox for submitted code does not hold: a program in it can {', '.join(escaped) or 'lie'}. Do "
            "not run submissions on this machine."
        )
