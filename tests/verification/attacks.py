"""Submissions that attack the sandbox, and what they must leave behind: nothing."""

import json
import os
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.verification.code import TestReport, run_tests
from sppo_lightning.verification.sandbox import Sandbox, decode, encode

TESTS = {"kind": "function", "fn": "f", "cases": [{"args": [1], "expected": "the right answer"}]}


def attack(code: str, seconds: float = 2.0, tests: dict[str, Any] = TESTS) -> TestReport:
    """What comes of a submission whose `f` does not know the answer."""
    start = time.monotonic()
    report = run_tests(textwrap.dedent(code), tests, timeout_seconds=seconds, memory_mb=256)
    assert time.monotonic() - start < seconds + 3.0
    assert report.passed == 0
    return report


def answer(code: str, *args: Any, seconds: float = 5.0) -> Any:
    """What `f` of a submission returns."""
    job = {
        "kind": "function",
        "fn": "f",
        "submission": textwrap.dedent(code),
        "cases": [{"args": encode(list(args))}],
    }
    (outcome,) = Sandbox(256).run(job, seconds)
    said = json.loads(outcome["said"])
    assert "value" in said, said
    return decode(said["value"])


def succeeds(expression: str, *args: Any) -> Any:
    """Whether an expression can be evaluated inside, or the name of what it raises."""
    return answer(
        f"""
        import ctypes, os, signal, socket, sys
        def f(*args):
            try:
                {expression}
                return True
            except BaseException as error:
                return type(error).__name__
        """,
        *args,
    )


def children() -> set[str]:
    """Processes of the machine that belong to a sandbox, and zombies of this process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        zombie = state == "Z" and (int(parent) == os.getpid() or name == "bwrap")
        if name == "bwrap" or "sppo_sandbox_runner" in command or zombie:
            found.add(f"{folder.name} {name} {state} {command}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    deadline = time.monotonic() + 2
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
