"""Runs submitted code, one process per case; runs inside the sandbox, on the standard library alone.

The job comes as JSON on standard input; each case's outcome leaves as a line of JSON on standard output. What is
expected never comes in. The runner itself executes nothing of the submission: each case is forked from it, gives up
whatever it could misuse, and only then compiles the first submitted line. Its memory, its time and its output are
watched from here, and its CPU time is what the kernel accounted.
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
import re  # noqa: F401
import resource
import selectors
import signal
import string  # noqa: F401
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sppo_lightning.verification.sandbox import seccomp, values

OUTPUT_BYTES = 1_000_000  # of a case: printed, or its value
FILE_BYTES = 16_000_000
THREADS = 64
STACK_BYTES = 64_000_000  # recursion is what many submissions are made of


class Case:
    """A running case: its process, and the pipes to it."""

    def __init__(self, number: int, job: dict[str, Any]) -> None:
        self.number = number
        self.wants_output = job["kind"] == "stdio"
        self.input = job["cases"][number].encode("utf-8", "surrogatepass") if self.wants_output else b""
        self.read: dict[int, bytearray] = {}
        self.too_much = False
        value, self.value_pipe = os.pipe()
        pipes = [os.pipe(), os.pipe()] if self.wants_output else []
        self.process = os.fork()
        if self.process == 0:
            _be_the_case(job, number, self.value_pipe, pipes)
        os.close(self.value_pipe)
        self.value_pipe, self.output_pipe, self.input_pipe = value, -1, -1
        self.read[value] = bytearray()
        if pipes:
            (stdin, self.input_pipe), (self.output_pipe, stdout) = pipes
            os.close(stdin)
            os.close(stdout)
            os.set_blocking(self.input_pipe, False)
            self.read[self.output_pipe] = bytearray()

    def outcome(self, status: int, usage: Any, timed_out: bool) -> dict[str, Any]:
        """What is said of it when it has ended."""
        found: dict[str, Any] = {"case": self.number, "seconds": usage.ru_utime + usage.ru_stime}
        said = bytes(self.read[self.value_pipe]).decode("utf-8", "replace")
        if self.too_much:
            return found | {"status": "output"}
        if timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
            return found | {"status": "timeout"}
        if os.WIFSIGNALED(status):
            return found | {"status": "killed", "signal": os.WTERMSIG(status)}
        found |= {"status": "ended", "code": os.WEXITSTATUS(status), "said": said}
        if self.wants_output:
            found["printed"] = bytes(self.read[self.output_pipe]).decode("utf-8", "replace")
        return found


def _be_the_case(job: dict[str, Any], number: int, value_pipe: int, pipes: list[tuple[int, int]]) -> None:
    """The forked process, which never returns."""
    # taken before the submission can put others in their places
    leave, put, dumps, encode = os._exit, _put, json.dumps, values.encode
    code = 3
    try:
        _give_up(job, value_pipe, pipes)
        source, case = job["submission"], job["cases"][number]
        try:
            if job["kind"] == "stdio":
                _module("__main__", source)
                answer: Any = {"done": True}
            else:
                answer = {"value": encode(_evaluate(source, job, case))}
            code = 0
        except MemoryError:
            answer = {"error": "MemoryError"}
        except SystemExit as exit_:
            answer = {"error": "SystemExit"}
            if job["kind"] == "stdio" and exit_.code in (None, 0):
                answer, code = {"done": True}, 0
        except BaseException as error:  # a submission may raise anything, and it is its own doing
            answer = {"error": type(error).__name__, "message": str(error)[:200]}
        if job["kind"] == "stdio":
            sys.stdout.flush()
        put(3, dumps(answer).encode())
    except BaseException:  # whatever a submission has done to what runs here: this process ends in `leave`
        code = 3
    finally:
        leave(code)


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


def _module(name: str, source: str, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment] # which `site` adds elsewhere
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__.update(given)
    exec(compile(source, "<submission>", "exec"), module.__dict__)
    return module.__dict__


def _evaluate(source: str, job: dict[str, Any], case: dict[str, Any]) -> Any:
    """What the case asks for: a call of the submission's function, or an expression of the tests."""
    names = _module("submission", source, {name: getattr(typing, name) for name in typing.__all__})
    if "args" in case:
        owner, _, method = job["fn"].rpartition(".")
        function = getattr(names[owner](), method) if owner else names[method]
        return function(*values.decode(case["args"]))
    exec(compile(case["setup"], "<tests>", "exec"), names)
    if "statement" in case:
        exec(compile(case["statement"], "<tests>", "exec"), names)
        return True
    # the tests' expression, in the process of the submission, which is in the sandbox and has given everything up
    return eval(compile(case["expression"], "<tests>", "eval"), names)


def run(job: dict[str, Any]) -> None:
    """Every case of a job, as many at a time as the job says, until its time is up."""
    deadline = time.monotonic() + job["timeout_seconds"]
    waiting = list(range(len(job["cases"])))[::-1]
    selector = selectors.DefaultSelector()
    running: dict[int, Case] = {}  # by process
    while waiting or running:
        while waiting and len(running) < job["at_once"]:
            case = Case(waiting.pop(), job)
            running[case.process] = case
            for pipe in case.read:
                selector.register(pipe, selectors.EVENT_READ, case)
            if case.input_pipe >= 0:
                selector.register(case.input_pipe, selectors.EVENT_WRITE, case)
        late = time.monotonic() >= deadline
        killed = {process for process, case in running.items() if late or case.too_much}
        for process in killed:
            os.kill(process, signal.SIGKILL)
        _serve(selector, 0.0 if killed else 0.005 if _some_are_silent(selector, running) else 0.1)
        for process, case in list(running.items()):
            ended, status, usage = os.wait4(process, 0 if process in killed else os.WNOHANG)
            if ended:
                _drain(selector, case)
                say(case.outcome(status, usage, late and os.WIFSIGNALED(status)))
                del running[process]
        if late:
            for number in waiting:
                say({"case": number, "seconds": 0.0, "status": "timeout"})
            return


def _some_are_silent(selector: selectors.BaseSelector, running: dict[int, Case]) -> bool:
    """Whether a running case has closed its pipes, so that only asking for it tells when it ends."""
    return any(case.value_pipe not in selector.get_map() for case in running.values())


def _serve(selector: selectors.BaseSelector, seconds: float) -> None:
    """Move what can be moved through the pipes."""
    for key, _ in selector.select(seconds):
        case: Case = key.data
        if key.fd == case.input_pipe:
            try:
                case.input = case.input[os.write(key.fd, case.input[:65536]) :] if case.input else b""
            except BlockingIOError:
                continue
            except OSError:
                case.input = b""
            if not case.input:
                selector.unregister(key.fd)
                os.close(key.fd)
                case.input_pipe = -1
        elif chunk := os.read(key.fd, 65536):
            case.read[key.fd] += chunk
            case.too_much = case.too_much or len(case.read[key.fd]) > OUTPUT_BYTES
        else:
            selector.unregister(key.fd)
            os.close(key.fd)


def _drain(selector: selectors.BaseSelector, case: Case) -> None:
    """Take what an ended case has left in its pipes, and close them."""
    for pipe in [*case.read, *([case.input_pipe] if case.input_pipe >= 0 else [])]:
        if pipe not in selector.get_map():
            continue
        selector.unregister(pipe)
        while pipe != case.input_pipe and (chunk := os.read(pipe, 65536)):
            case.read[pipe] += chunk
        case.too_much = case.too_much or len(case.read.get(pipe, b"")) > OUTPUT_BYTES
        os.close(pipe)


def say(line: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    _put(1, (json.dumps(line) + "\n").encode())


def _put(descriptor: int, text: bytes, write: Callable[[int, bytes], int] = os.write) -> None:
    while text:
        text = text[write(descriptor, text) :]


def main() -> None:
    """Read the job and run it."""
    os.closerange(3, 256)
    job = json.loads(sys.stdin.buffer.read())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    say({"ready": True})
    run(job)
