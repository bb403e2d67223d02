"""How many submissions a second the sandbox takes: each with four cases, in a sandbox of its own."""

from __future__ import annotations

import argparse
import os
import time

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import CodeVerifier
from sppo_lightning.verification.sandbox import check_sandbox

CASES = [{"args": [n], "expected": n * n} for n in range(4)]


def main() -> None:
    """Score different right submissions, and print how many per second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--submissions", type=int, default=200)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="submissions side by side"
    )
    arguments = parser.parse_args()
    verifier = CodeVerifier(workers=arguments.workers)
    check_sandbox(verifier.sandbox)  # and copies the interpreter, once per user
    prompts = [
        Prompt("", "", "squares", row, metadata={"tests": {"kind": "function", "fn": "square", "cases": CASES}})
        for row in range(arguments.submissions)
    ]
    responses = [
        f"```python\ndef square(x):\n    return x * x  # {row}\n```" for row in range(arguments.submissions)
    ]
    start = time.perf_counter()
    scores = verifier.score(prompts, responses)
    seconds = time.perf_counter() - start
    if scores != [1.0] * len(responses):
        raise SystemExit(f"{scores.count(1.0)} of {len(scores)} right submissions passed.")
    print(f"{len(responses) / seconds:.1f} submissions of 4 cases a second, {arguments.workers} side by side")


if __name__ == "__main__":
    main()
