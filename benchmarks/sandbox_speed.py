"""How fast the sandbox is: submissions of four cases per second, and how long one takes.

Each submission has a sandbox of its own: started when it comes ("cold"), or ahead while others run ("ahead", as
`CodeVerifier` does). The rate is the best of several rounds, since other work on the machine only slows it down.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sppo_lightning.callbacks import CodeVerifier  # as in a trainer, with all that it loads
from sppo_lightning.verification.code import Plan, check, plan
from sppo_lightning.verification.sandbox import Sandbox, check_sandbox

CASES = [{"args": [n], "expected": n * n} for n in range(4)]


def score(sandbox: Sandbox, submissions: Sequence[str], workers: int, ahead: bool) -> float:
    """Seconds that all submissions take together."""
    tests: Plan = plan({"kind": "function", "fn": "square", "cases": CASES})
    start = time.perf_counter()
    with (
        sandbox.warm(len(submissions), workers) if ahead else contextlib.nullcontext(),
        ThreadPoolExecutor(workers) as threads,
    ):
        reports = list(threads.map(lambda code: check(sandbox, code, tests, 5.0, at_once=1), submissions))
    seconds = time.perf_counter() - start
    passed = sum(report.status == "passed" for report in reports)
    if passed != len(reports):
        raise SystemExit(f"{passed} of {len(reports)} right submissions passed.")
    return seconds


def latency(sandbox: Sandbox, submissions: Sequence[str], ahead: bool) -> float:
    """Median seconds of one submission, where nothing else runs and a sandbox has had the time to get ready."""
    tests: Plan = plan({"kind": "function", "fn": "square", "cases": CASES})
    found = []
    with sandbox.warm(len(submissions), 1) if ahead else contextlib.nullcontext():
        for code in submissions:
            time.sleep(0.1)
            start = time.perf_counter()
            check(sandbox, code, tests, 5.0, at_once=1)
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Run different right submissions, and print a line for each way of starting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--submissions", type=int, default=100, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="submissions side by side"
    )
    arguments = parser.parse_args()
    sandbox = CodeVerifier(workers=arguments.workers).sandbox
    check_sandbox(sandbox)  # and copies the interpreter, once per user
    submissions = [f"def square(x):\n    return x * x  # {n}\n" for n in range(arguments.submissions)]
    print(f"{'started':>8} {'submissions/s':>14} {'ms for one':>11}   ({arguments.workers} side by side)")
    for name, ahead in (("cold", False), ("ahead", True)):
        seconds = min(score(sandbox, submissions, arguments.workers, ahead) for _ in range(arguments.rounds))
        one = latency(sandbox, submissions[:20], ahead)
        print(f"{name:>8} {len(submissions) / seconds:>14.1f} {one * 1000:>11.1f}")


if __name__ == "__main__":
    main()
