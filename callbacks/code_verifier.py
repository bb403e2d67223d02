"""A verifier for programs with tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Truncated, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification.code import Plan, TestReport, check, last_code_block, plan
from sppo_lightning.verification.sandbox import Sandbox, SandboxFailure, check_sandbox

CodeReward = Literal["all", "fraction", "efficiency"]


class CodeVerifier(Verifier):
    """Runs the last fenced Python block of a response against its prompt's tests, in a sandbox.

    Tests stand in the row's column `tests`, or in its gold answer: a mapping, or JSON, as `run_tests` describes it.
    A response without a code block, or one that was cut off, scores 0. Where the sandbox fails there is no verdict.

    Nothing is ever run outside the sandbox. It is tried out at start-up, and where it does not hold the run does
    not start.

    Args:
        reward: "all" for 1.0 where every test passes, else 0.0; "fraction" for the share that passes; "efficiency"
            for the reference time over the submission's CPU time, at most 1.0, where every test passes. The
            reference time is `reference_seconds` among the tests.
        timeout_seconds: Wall-clock time of a submission's tests together.
        memory_mb: Address space of a test.
        workers: Submissions side by side; one per core of this process when left out.
        unsafe_no_sandbox: Run submissions with limits alone where bubblewrap cannot be used. They can then read
            what an unprivileged user can; every run warns.
        truncated: A response that was cut off is "unanswered", which scores 0, or "scored" as any other.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(
        self,
        reward: CodeReward = "all",
        timeout_seconds: float = 5.0,
        memory_mb: int = 512,
        workers: int | None = None,
        unsafe_no_sandbox: bool = False,
        truncated: Truncated = "unanswered",
        **settings: Any,
    ) -> None:
        super().__init__(truncated=truncated, **settings)
        if reward not in ("all", "fraction", "efficiency"):
            raise InputError(f"`CodeVerifier.reward`={reward!r} is unknown; use all, fraction or efficiency.")
        for setting, value, least in (
            ("timeout_seconds", timeout_seconds, 0.1),
            ("memory_mb", memory_mb, 64),
            ("workers", workers, 1),
        ):
            if value is not None and not value >= least:
                raise InputError(
                    f"`CodeVerifier.{setting}`={value} leaves nothing to run with; use {least} or more."
                )
        self.reward = reward
        self.timeout_seconds = timeout_seconds
        self.workers = workers or len(os.sched_getaffinity(0))
        self.sandbox = Sandbox(memory_mb, unsafe_no_sandbox)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Try the sandbox out."""
        super().setup(trainer, pl_module, stage)
        if not self.sandbox.unsafe_no_sandbox:
            check_sandbox(self.sandbox)
            return
        rank_zero_warn(
            "`CodeVerifier.unsafe_no_sandbox`=True: submitted code runs on this machine with limits on time, "
            "memory and system calls, but it sees the machine's files. Install bubblewrap and remove the setting."
        )

    def unusable(self, prompt: Prompt) -> str | None:
        """Tests that are none."""
        try:
            plan(tests_of(prompt))
        except ValueError as error:
            return str(error)
        return None

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """A score for each response, the same response to the same tests being run once."""
        tests = [tests_of(prompt) for prompt in prompts]
        keys = [json.dumps(each, sort_keys=True, default=repr) for each in tests]
        plans: dict[str, Plan] = {}  # made once, however many responses a prompt has
        for prompt, each, key in zip(prompts, tests, keys, strict=True):
            plans[key] = plans.get(key) or plan_of(prompt, each)
        pairs = [(last_code_block(text), key) for text, key in zip(responses, keys, strict=True)]
        different = list(dict.fromkeys((code, key) for code, key in pairs if code is not None))
        with self.sandbox.warm(len(different), spare=self.workers), ThreadPoolExecutor(self.workers) as threads:
            found = threads.map(lambda pair: self._report(pair[0], plans[pair[1]]), different)
            reports: dict[Any, TestReport | None] = dict(zip(different, found, strict=True))
        self.counts["timeouts"] += sum(r is not None and r.status == "timeout" for r in map(reports.get, pairs))
        return [
            0.0 if pair[0] is None else self._score_of(reports[pair], each)
            for pair, each in zip(pairs, tests, strict=True)
        ]

    def _report(self, code: str, plan: Plan) -> TestReport | None:
        """What came of the tests; None where the sandbox failed."""
        try:
            return check(self.sandbox, code, plan, self.timeout_seconds, at_once=1)
        except SandboxFailure as error:
            self.counts["errors"] += 1
            self._first_traceback = self._first_traceback or f"the sandbox: {error}"
            return None

    def _score_of(self, report: TestReport | None, tests: Mapping[str, Any]) -> float | None:
        if report is None:
            return None
        if self.reward == "fraction":
            return report.fraction
        if report.status != "passed":
            return 0.0
        if self.reward == "all":
            return 1.0
        return min(1.0, float(tests["reference_seconds"]) / max(report.seconds, 1e-9))


def tests_of(prompt: Prompt) -> Mapping[str, Any]:
    """The tests of a prompt; raises `InputError` for a prompt without any."""
    found: Any = prompt.metadata.get("tests") or prompt.gold
    try:
        tests = json.loads(found) if isinstance(found, str) else found
    except ValueError as error:
        raise _refused(prompt, str(error)) from error
    if not isinstance(tests, Mapping):
        raise _refused(prompt, "they are no mapping")
    return tests


def plan_of(prompt: Prompt, tests: Mapping[str, Any]) -> Plan:
    """What is done with a prompt's tests; raises `InputError` for such as cannot be run."""
    try:
        return plan(tests)
    except ValueError as error:
        raise _refused(prompt, str(error)) from error


def _refused(prompt: Prompt, why: str) -> InputError:
    return InputError(
        f"Row {prompt.row} of {prompt.dataset!r} has no tests that CodeVerifier can run ({why}); give it a column "
        '`tests`, such as {"kind": "function", "fn": "add", "cases": [{"args": [1, 2], "expected": 3}]}.'
    )
