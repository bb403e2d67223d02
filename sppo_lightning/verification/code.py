"""Whether a program does what its tests say, without trusting a word of it.

A submission runs in a sandbox and never sees what is expected of it: inputs go in, values of exact builtin types or
printed text come out, and are compared here.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sppo_lightning.verification.asserts import take_apart
from sppo_lightning.verification.expressions import Unanswered
from sppo_lightning.verification.sandbox import NotPlain, Sandbox, decode, encode

MAX_AT_ONCE = 64  # cases of a submission; each has up to `memory_mb` and four open files
Judge = Callable[[Any], bool]  # of a decoded value, or of printed text
Plan = tuple[dict[str, Any], list[Judge]]  # the sandbox's job, which holds no expected value; a judge for each case
Status = Literal["passed", "failed", "error", "timeout", "memory", "output", "crashed"]


@dataclass(frozen=True)
class TestReport:
    """What came of a submission's tests.

    `status` is "passed" where all passed; else what happened most often among the others: "failed" (a wrong value
    or text), "error" (it raised, or ended early), "timeout", "memory", "output" (too much of it) or "crashed"
    (killed by a signal).
    """

    __test__ = False  # for pytest, which collects classes by their names

    passed: int
    total: int
    status: Status
    seconds: float  # CPU time of all cases, as the kernel accounted it
    cases: tuple[Status, ...] = ()  # of each, in order

    @property
    def fraction(self) -> float:
        """Share of the cases that passed."""
        return self.passed / self.total


def run_tests(
    submission: str, tests: Mapping[str, Any], *, timeout_seconds: float = 5.0, memory_mb: int = 512
) -> TestReport:
    """Run a submission against its tests in the sandbox.

    Args:
        submission: Python source.
        tests: `{"kind": "function", "fn": "add" or "Solution.add", "cases": [{"args": […], "expected": …}]}`,
            `{"kind": "stdio", "cases": [{"stdin": "…", "stdout": "…"}]}`, or
            `{"kind": "asserts", "code": "assert sq(3) == 9"}`.
        timeout_seconds: Wall-clock time of all cases together.
        memory_mb: Address space of a case.

    Raises:
        ValueError: For tests that are none.
        SandboxFailure: Where the sandbox failed; that says nothing about the submission.
        InputError: Where there is no sandbox on this machine.
    """
    at_once = min(len(os.sched_getaffinity(0)), MAX_AT_ONCE)
    return check(Sandbox(memory_mb), submission, plan(tests), timeout_seconds, at_once)


def check(sandbox: Sandbox, submission: str, plan: Plan, timeout_seconds: float, at_once: int) -> TestReport:
    """`run_tests` in a given sandbox, so many cases side by side."""
    job, judges = plan
    outcomes = sandbox.run({**job, "submission": submission}, timeout_seconds, at_once)
    cases = tuple(_status(outcome, judge) for outcome, judge in zip(outcomes, judges, strict=True))
    passed = cases.count("passed")
    others: Counter[Status] = Counter(status for status in cases if status != "passed")
    status: Status = others.most_common(1)[0][0] if others else "passed"
    return TestReport(passed, len(cases), status, sum(outcome["seconds"] for outcome in outcomes), cases)


def last_code_block(response: str) -> str | None:
    """The content of the last closed block fenced as Python, or as nothing, in what follows `</think>`; or None."""
    found: str | None = None
    fenced: list[str] | None = None  # the lines of the open block
    is_python = False
    for line in response.rpartition("</think>")[2].split("\n"):
        mark = line.strip()
        if fenced is None and mark.startswith("```"):
            fenced, is_python = [], mark[3:].strip().lower() in ("", "python", "python3", "py")
        elif fenced is not None and mark == "```":
            found, fenced = ("\n".join(fenced) if is_python else found), None
        elif fenced is not None:
            fenced.append(line)
    return found


def plan(tests: Mapping[str, Any]) -> Plan:
    """What is done with tests; raises `ValueError` for such as are none."""
    kinds: dict[Any, Callable[[Mapping[str, Any]], Plan]] = {
        "function": _plan_function,
        "stdio": _plan_stdio,
        "asserts": _plan_asserts,
    }
    kind = tests.get("kind")
    if kind not in kinds:
        raise ValueError(f"Tests of the kind {kind!r} are not known; use function, stdio or asserts.")
    try:
        job, judges = kinds[kind](tests)
    except (KeyError, TypeError, NotPlain) as error:
        raise ValueError(f"Tests of the kind {kind!r} lack something, or have too much of it: {error}.") from error
    if not judges:
        raise ValueError(f"Tests of the kind {kind!r} without a case say nothing.")
    return job, judges


def _plan_function(tests: Mapping[str, Any]) -> Plan:
    name = tests["fn"]
    if not isinstance(name, str) or not 1 <= len(name.split(".")) <= 2:
        raise ValueError(f"`fn`={name!r} is neither a function nor a class's method, such as Solution.add.")
    cases = [{"args": encode(list(case["args"]))} for case in tests["cases"]]
    judges = [_equals(case["expected"]) for case in tests["cases"]]
    return {"kind": "function", "fn": name, "cases": cases}, judges


def _plan_stdio(tests: Mapping[str, Any]) -> Plan:
    cases = [_text(case["stdin"]) for case in tests["cases"]]
    judges = [_prints(_text(case["stdout"])) for case in tests["cases"]]
    return {"kind": "stdio", "cases": cases}, judges


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _plan_asserts(tests: Mapping[str, Any]) -> Plan:
    cases, judges = take_apart(tests["code"])
    return {"kind": "asserts", "cases": cases}, judges


def _status(outcome: Mapping[str, Any], judge: Judge) -> Status:
    """What one case came to."""
    status = outcome["status"]
    if status in ("timeout", "output"):
        return status
    if status == "killed":
        return "crashed"
    try:
        said = json.loads(outcome["said"])
        if said.get("error") == "MemoryError":
            return "memory"
        if outcome["code"] != 0 or "error" in said:
            return "error"
        answer = outcome["printed"] if "printed" in outcome else _answer(said)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, NotPlain):
        if "printed" not in outcome or outcome["code"] != 0:
            return "error"  # it ended early, or wrote into the pipe itself
        answer = outcome["printed"]
    try:
        return "passed" if judge(answer) else "failed"
    except Unanswered:
        return "error"
    except Exception:  # values that cannot be compared are the submission's doing
        return "failed"


def _answer(said: Mapping[str, Any]) -> Any:
    if "asked" not in said:
        return decode(said["value"])
    return [
        asked if isinstance(asked, bool) else [(plain is True, decode(value)) for plain, value in asked]
        for asked in said["asked"]
    ]


def _equals(expected: Any) -> Judge:
    return lambda value: equal(value, expected)


def equal(value: Any, expected: Any) -> bool:
    """Whether a plain value is the expected one.

    A tuple is as good as a list, since JSON knows no tuples; a whole float is as good as an int, a bool is not.
    Floats agree to nine digits.
    """
    if isinstance(value, bool) or isinstance(expected, bool):
        return isinstance(value, bool) and isinstance(expected, bool) and value == expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        if math.isnan(value) or math.isnan(expected):
            return math.isnan(value) and math.isnan(expected)
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(equal(a, b) for a, b in zip(value, expected, strict=True))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(equal(value[key], expected[key]) for key in expected)
    if isinstance(value, frozenset) and isinstance(expected, set | frozenset):
        return value == expected
    return type(value) is type(expected) and value == expected


def _prints(expected: str) -> Judge:
    wanted = _lines(expected)
    return lambda printed: _lines(printed) == wanted


def _lines(text: str) -> Sequence[str]:
    """Lines without the white space at their ends, and without empty ones at the end."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
