"""Runs submitted code in processes of its own; runs inside the sandbox, on the standard library alone.

The job comes as JSON on standard input; each case's outcome leaves as a line of JSON on standard output. What is
expected never comes in. The runner itself executes nothing of the submission: it forks a process for each case (for
asserts, which may build on each other, one for all as long as it lives), and watches its memory, its time and its
output. CPU time is what the kernel accounted.
"""

from __future__ import annotations

import gc
import json
import os
import select
import sys
import time

from sppo_lightning.verification.sandbox import case as child

TYPE_CHECKING = False  # `typing` and `signal` would take milliseconds of every start
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_SIGKILL, _SIGXCPU = 9, 24
OUTPUT_BYTES = 1_000_000  # of a process: printed, or its values
TMP_FILES = 5_000  # of all cases; each takes memory that no other limit counts


class Case:
    """A running process with one case, or with those of asserts from one on, and the pipes to it."""

    def __init__(self, numbers: range, job: dict[str, Any]) -> None:
        self.numbers = numbers
        self.wants_output = job["kind"] == "stdio"
        self.input = job["cases"][numbers[0]].encode("utf-8", "surrogatepass") if self.wants_output else b""
        self.read: dict[int, bytearray] = {}
        self.too_much = False
        value, self.value_pipe = os.pipe()
        pipes = [os.pipe(), os.pipe()] if self.wants_output else []
        self.process = os.fork()
        if self.process == 0:
            child.be_the_case(job, numbers, self.value_pipe, pipes)
        os.close(self.value_pipe)
        self.value_pipe, self.output_pipe, self.input_pipe = value, -1, -1
        self.read[value] = bytearray()
        if pipes:
            (stdin, self.input_pipe), (self.output_pipe, stdout) = pipes
            os.close(stdin)
            os.close(stdout)
            os.set_blocking(self.input_pipe, False)
            self.read[self.output_pipe] = bytearray()

    def take(self, pipe: int, chunk: bytes) -> None:
        """What came out of a pipe."""
        self.read[pipe] += chunk
        self.too_much = self.too_much or len(self.read[pipe]) > OUTPUT_BYTES

    def outcomes(self, status: int, usage: Any, timed_out: bool) -> list[dict[str, Any]]:
        """What is said of its cases, now that it has ended: those that it answered, and the one it ended in."""
        *lines, rest = bytes(self.read[self.value_pipe]).decode("utf-8", "replace").split("\n")
        answered = lines[: len(self.numbers) - 1]
        found = [{"status": "ended", "code": 0, "said": line, "seconds": 0.0} for line in answered]
        last = self._end(status, timed_out)
        if last["status"] == "ended":
            last["said"] = [*lines, rest][len(answered)]
        last["seconds"] = usage.ru_utime + usage.ru_stime
        return [{"case": self.numbers[place], **outcome} for place, outcome in enumerate([*found, last])]

    def _end(self, status: int, timed_out: bool) -> dict[str, Any]:
        """How the process ended."""
        if self.too_much:
            return {"status": "output"}
        if timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == _SIGXCPU):
            return {"status": "timeout"}
        if os.WIFSIGNALED(status):
            return {"status": "killed", "signal": os.WTERMSIG(status)}
        found: dict[str, Any] = {"status": "ended", "code": os.WEXITSTATUS(status)}
        if self.wants_output:
            found["printed"] = bytes(self.read[self.output_pipe]).decode("utf-8", "replace")
        return found


def run(job: dict[str, Any]) -> None:
    """Every case of a job, as many at a time as the job says, until its time is up."""
    deadline = time.monotonic() + job["timeout_seconds"]
    files = _files() + TMP_FILES
    number = len(job["cases"])
    waiting = [range(number)] if job["kind"] == "asserts" else [range(n, n + 1) for n in reversed(range(number))]
    pipes = _Pipes()
    running: dict[int, Case] = {}  # by process
    while waiting or running:
        while waiting and len(running) < job["at_once"]:
            case = Case(waiting.pop(), job)
            running[case.process] = case
            pipes.watch(case)
        late = time.monotonic() >= deadline
        flooded = _files() > files
        for case in running.values():
            case.too_much = case.too_much or flooded
        killed = {process for process, case in running.items() if late or case.too_much}
        for process in killed:
            os.kill(process, _SIGKILL)
        pipes.serve(0.0 if killed else 0.001 if pipes.any_silent(running.values()) else 0.1)
        for process, case in list(running.items()):
            ended, status, usage = os.wait4(process, 0 if process in killed else os.WNOHANG)
            if ended:
                del running[process]
                pipes.drain(case)
                for outcome in case.outcomes(status, usage, late and os.WIFSIGNALED(status)):
                    say(outcome)
                if left := case.numbers[outcome["case"] + 1 - case.numbers[0] :]:
                    waiting.append(left)
        if late or flooded:
            for case_number in [n for numbers in waiting for n in numbers]:
                say({"case": case_number, "seconds": 0.0, "status": "timeout" if late else "output"})
            return


def _files() -> int:
    """How many files and folders `/tmp` holds; not without a sandbox, where others have theirs there."""
    if os.getpid() != 1:
        return 0
    room = os.statvfs("/tmp")  # noqa: S108
    return room.f_files - room.f_ffree


class _Pipes:
    """The pipes of all running cases, and what is moved through them."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self.cases: dict[int, Case] = {}  # by pipe

    def watch(self, case: Case) -> None:
        """From now on."""
        for pipe in case.read:
            self.poll.register(pipe, select.POLLIN)
            self.cases[pipe] = case
        if case.input_pipe >= 0:
            self.poll.register(case.input_pipe, select.POLLOUT)
            self.cases[case.input_pipe] = case

    def any_silent(self, cases: Iterable[Case]) -> bool:
        """Whether a running case has closed its pipes, so that only asking for it tells when it ends."""
        return any(case.value_pipe not in self.cases for case in cases)

    def serve(self, seconds: float) -> None:
        """Move what can be moved, or wait for so long."""
        for pipe, _ in self.poll.poll(seconds * 1000):
            case = self.cases[pipe]
            if pipe == case.input_pipe:
                self._feed(case)
            elif chunk := os.read(pipe, 65536):
                case.take(pipe, chunk)
            else:
                self._close(pipe)

    def _feed(self, case: Case) -> None:
        try:
            case.input = case.input[os.write(case.input_pipe, case.input[:65536]) :] if case.input else b""
        except BlockingIOError:
            return
        except OSError:  # it does not want more
            case.input = b""
        if not case.input:
            self._close(case.input_pipe)
            case.input_pipe = -1

    def drain(self, case: Case) -> None:
        """Take what an ended case has left in its pipes, and close them."""
        for pipe in [*case.read, case.input_pipe]:
            if pipe not in self.cases:
                continue
            while pipe != case.input_pipe and (chunk := os.read(pipe, 65536)):
                case.take(pipe, chunk)
            self._close(pipe)

    def _close(self, pipe: int) -> None:
        self.poll.unregister(pipe)
        del self.cases[pipe]
        os.close(pipe)


def say(line: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    child.put(1, (json.dumps(line) + "\n").encode())


def _read_job() -> dict[str, Any]:
    """Its length stands before it: the end of the pipe may not come, since others could hold it open."""
    given = sys.stdin.buffer
    return json.loads(given.read(int.from_bytes(given.read(8), "big")) or "null")


def main() -> None:
    """Get ready, read the job and run it."""
    os.closerange(3, 256)
    child.warm_up()
    gc.freeze()  # what a collection does not touch stays shared with the cases
    say({"ready": True})
    job = _read_job()
    if job is not None:  # it was wanted
        child.prepare(job)
        say({"started": True})
        run(job)
    os._exit(0)  # tidying up takes milliseconds
