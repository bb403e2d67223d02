"""The process that submitted code runs in; inside the sandbox, on the standard library alone.

Forked by the runner, it gives up whatever it could misuse, and only then compiles the first submitted line. It
answers each of its cases with a line of JSON.
"""

from __future__ import annotations

import bisect  # noqa: F401 (what submissions import is warm when they start)
import builtins
import collections  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import os
import re
import resource
import sys
import types

from sppo_lightning.verification.sandbox import seccomp, values

TYPE_CHECKING = False  # `typing` would take milliseconds of every start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO

OWN_FRAMES = 30  # below the submission's first
FILE_BYTES = 16_000_000
THREADS = 64
STACK_BYTES = 64_000_000  # recursion is what many submissions are made of


def warm_up() -> None:
    """Before there is a job: what every case would do once more for itself."""
    seccomp.prepared()
    compile("def f(x):\n    return x", "<warm>", "exec")


def prepare(job: dict[str, Any]) -> None:
    """Import `typing` where a name of it may be used: it takes longest of all."""
    text = job["submission"] + (str(job["cases"]) if job["kind"] == "asserts" else "")
    if job["kind"] != "stdio" and set(re.findall(r"\b[A-Z]\w+", text)) - {"True", "False", "None"}:
        import typing  # noqa: F401


def be_the_case(job: dict[str, Any], numbers: range, value_pipe: int, pipes: list[tuple[int, int]]) -> None:
    """Answer the cases of these numbers; never returns."""
    # taken before the submission can put others in their places
    leave, dumps, answer_of = os._exit, json.dumps, _answer_of
    code = 3
    try:
        _give_up(job, value_pipe, pipes)
        submission = _Submission(job, values.encode)
        for number in numbers:
            answer, code = answer_of(submission, number)
            put(3, (dumps(answer) + "\n").encode())
    except BaseException:  # whatever a submission has done to what runs here: this process ends in `leave`
        code = 3
    finally:
        leave(code)


def _answer_of(submission: _Submission, number: int) -> tuple[dict[str, Any], int]:
    """What is said of a case, and the status to exit with."""
    stdio, stdout = submission.job["kind"] == "stdio", sys.stdout
    answer, code = {}, 3
    try:
        answer, code = submission.answer(number), 0
    except MemoryError:
        answer = {"error": "MemoryError"}
    except SystemExit as exit_:
        answer = {"error": "SystemExit"}
        if stdio and exit_.code in (None, 0):
            answer, code = {"done": True}, 0
    except BaseException as error:  # a submission may raise anything, and it is its own doing
        answer = {"error": type(error).__name__, "message": str(error)[:200]}
    if stdio:
        _finish(submission.names, stdout)
    return answer, code


def _finish(names: dict[str, Any], stdout: TextIO) -> None:
    """What the interpreter does at its end: threads and exit handlers may have something left to print."""
    threading, atexit = sys.modules.get("threading"), sys.modules.get("atexit")
    for step in (
        *((threading._shutdown,) if threading else ()),
        *((atexit._run_exitfuncs,) if atexit else ()),
        lambda: sys.stdout.flush(),
        names.clear,  # closes files that were left open
        stdout.flush,
    ):
        try:  # noqa: SIM105
            step()
        except Exception:  # what a submission left to run may raise anything, and the next step is due all the same
            pass


def _give_up(job: dict[str, Any], value_pipe: int, pipes: list[tuple[int, int]]) -> None:
    """Everything that a case could misuse, for good."""
    nothing = os.open("/dev/null", os.O_RDWR)
    stdin, stdout = (pipes[0][0], pipes[1][1]) if pipes else (nothing, nothing)
    for source, target in ((stdin, 100), (stdout, 101), (nothing, 102), (value_pipe, 103)):
        os.dup2(source, target)
    for source, target in ((100, 0), (101, 1), (102, 2), (103, 3)):
        os.dup2(source, target)
    os.closerange(4, 1024)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(sys.getrecursionlimit() + OWN_FRAMES)
    seconds = math.ceil(job["timeout_seconds"]) + 1
    for limit, soft, hard in (
        (resource.RLIMIT_STACK, STACK_BYTES, None),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, job["memory_bytes"], job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_NPROC, THREADS, THREADS),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, most = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:  # a limit may be lowered, never raised
            soft, hard = min(soft, most), most if hard is None else min(hard, most)
        resource.setrlimit(limit, (soft, most if hard is None else hard))
    seccomp.install()


class _Submission:
    """A submission's module, and what the cases ask of it."""

    def __init__(self, job: dict[str, Any], encode: Callable[[Any], Any]) -> None:
        self.job = job
        self.encode = encode
        self.names: dict[str, Any] = {}
        self.loaded = False
        self.next = 0  # case whose steps are still to be done

    def answer(self, number: int) -> dict[str, Any]:
        """Raises whatever the submission does."""
        if not self.loaded:
            self._load()
        case = self.job["cases"][number]
        if self.job["kind"] == "stdio":
            return {"done": True}
        if self.job["kind"] == "asserts":
            return {"asked": self._asked(number)}
        owner, _, method = self.job["fn"].rpartition(".")
        function = getattr(self.names[owner](), method) if owner else self.names[method]
        return {"value": self.encode(function(*values.decode(case["args"])))}

    def _load(self) -> None:
        stdio = self.job["kind"] == "stdio"
        # tasks' templates use the names of `typing` without importing them
        typing = None if stdio else sys.modules.get("typing")
        given = {name: getattr(typing, name) for name in typing.__all__} if typing else {}
        self.names = _module("__main__" if stdio else "submission", self.job["submission"], given)
        self.loaded = True

    def _asked(self, number: int) -> list[Any]:
        """Take the steps up to and of the case; asks nothing again that belongs to an earlier one."""
        answers = []
        for case in range(self.next, number + 1):
            self.next = case + 1  # where a step raises, it is not taken again
            for kind, content, *whole in self.job["cases"][case]["steps"]:
                if kind == "do":
                    exec(compile(content, "<tests>", "exec", dont_inherit=True), self.names)
                elif case == number:
                    answers.append(self._ask(content, whole[0]))
        return answers

    def _ask(self, expressions: list[str], whole: str | None) -> Any:
        """An answer for each of the tests' expressions, or whether the whole of them holds."""
        found, answers = {}, []
        for place, expression in enumerate(expressions):
            try:
                found[f"_{place}"] = eval(compile(expression, "<tests>", "eval", dont_inherit=True), self.names)
            except MemoryError:
                raise
            except Exception as error:
                answers.append([False, type(error).__name__])
                continue
            try:
                answers.append([True, self.encode(found[f"_{place}"])])
            except values.NotPlain as error:
                answers.append([False, str(error)])
        same = len(found) == len(expressions) and len(set(map(type, found.values()))) == 1
        if whole and same and not any(plain for plain, _ in answers):
            return bool(eval(compile(whole, "<tests>", "eval", dont_inherit=True), self.names, found))
        return answers


def _module(name: str, source: str, given: dict[str, Any]) -> dict[str, Any]:
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment] # which `site` adds elsewhere
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__.update(given, __file__="/tmp/submission.py")  # noqa: S108
    # without the `annotations` of this file's first import
    exec(compile(source.removeprefix("\ufeff"), "<submission>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def put(descriptor: int, text: bytes, write: Callable[[int, bytes], int] = os.write) -> None:
    """Write all of it."""
    while text:
        text = text[write(descriptor, text) :]
