"""A verifier for programs with tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Truncated, Verifier
from sppo_lightning.errors import InputError, check_option
from sppo_lightning.verification.code import Plan, TestReport, check, last_code_block, plan
from sppo_lightning.verification.hidden_tests import split_tests
from sppo_lightning.verification.sandbox import Sandbox, SandboxFailure, check_sandbox

CodeReward = Literal["all", "fraction", "efficiency"]
Cases = Literal["visible", "hidden"]


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
        hidden_share: Share of each problem's cases that the reward never sees, from 0 to below 1; the same ones in
            every verifier with the same share.
        cases: "visible" for all but those; "hidden" for those alone, as a check of HackingMonitor.
        unsafe_no_sandbox: Run submissions with limits alone where bubblewrap cannot be used. They can then read
            what an unprivileged user can; every run warns.
        truncated: A response that was cut off is "unanswered", which scores 0, or "scored" as any other.
        **settings: Those of every verifier: see `Verifier`.
    """

    scores_early = True

    def __init__(
        self,
        reward: CodeReward = "all",
        timeout_seconds: float = 5.0,
        memory_mb: int = 512,
        workers: int | None = None,
        hidden_share: float = 0.0,
        cases: Cases = "visible",
        unsafe_no_sandbox: bool = False,
        truncated: Truncated = "unanswered",
        **settings: Any,
    ) -> None:
        super().__init__(truncated=truncated, **settings)
        check_option("CodeVerifier.reward", reward, CodeReward)
        check_option("CodeVerifier.cases", cases, Cases)
        if not 0 <= hidden_share < 1 or (cases == "hidden" and not hidden_share):
            raise InputError(f"`CodeVerifier.hidden_share`={hidden_share} leaves no {cases} case; use such as 0.3.")
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
        self.hidden_share = hidden_share
        self.cases = cases
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
        """Why no response to a prompt can be tested: tests that are none, or of which none is left."""
        try:
            self._tests_and_plan(prompt)
        except ValueError as error:
            return str(error)
        return None

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """A score for each response, the same response to the same tests being run once."""
        planned = {key: self._planned(prompt) for key, prompt in {id(each): each for each in prompts}.items()}
        codes = map(last_code_block, responses)
        pairs = [(code, planned[id(prompt)]) for prompt, code in zip(prompts, codes, strict=True)]
        different = {(code, tests.key): tests for code, tests in pairs if code is not None}
        with self.sandbox.warm(len(different), spare=self.workers), ThreadPoolExecutor(self.workers) as threads:
            made = threads.map(lambda item: self._report(item[0][0], item[1].plan), different.items())
            reports: dict[Any, TestReport | None] = dict(zip(different, made, strict=True))
        scored = [(None if code is None else reports[code, tests.key], code, tests) for code, tests in pairs]
        self.counts["timeouts"] += sum(r is not None and r.status == "timeout" for r, _, _ in scored)
        return [0.0 if code is None else self._score_of(report, tests.tests) for report, code, tests in scored]

    def _planned(self, prompt: Prompt) -> _Tests:
        try:
            return self._tests_and_plan(prompt)
        except ValueError as error:
            raise InputError(f"Row {prompt.row} of {prompt.dataset!r} cannot be tested: {error}.") from error

    def _tests_and_plan(self, prompt: Prompt) -> _Tests:
        """The tests that count here, and what is done with them; raises `ValueError` where there are none."""
        visible, hidden = split_tests(tests_of(prompt), self.hidden_share, key=prompt.question)
        tests = visible if self.cases == "visible" else hidden
        if tests is None:
            raise ValueError(f"it has no case to hide with `hidden_share`={self.hidden_share:g}")
        if self.reward == "efficiency" and not _is_positive(tests.get("reference_seconds")):
            raise ValueError("its tests lack `reference_seconds`, the time that `reward: efficiency` compares with")
        return _Tests(tests, plan(tests), json.dumps(tests, sort_keys=True, default=repr))

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


class _Tests(NamedTuple):
    """A prompt's tests, and what is done with them."""

    tests: Mapping[str, Any]
    plan: Plan
    key: str  # the same for the same tests


def tests_of(prompt: Prompt) -> Mapping[str, Any]:
    """The tests of a prompt; raises `ValueError` for a prompt without any."""
    example = '{"kind": "function", "fn": "add", "cases": [{"args": [1, 2], "expected": 3}]}'
    found: Any = prompt.metadata.get("tests") or prompt.gold
    try:
        tests = json.loads(found) if isinstance(found, str) else found
    except ValueError as error:
        raise ValueError(f"its tests are no JSON ({error}); give it a column `tests`, such as {example}") from error
    if not isinstance(tests, Mapping):
        raise ValueError(f"its tests are no mapping; give it a column `tests`, such as {example}")
    return tests


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
