"""A verifier for mathematics with a gold answer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Truncated, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification import close_workers, verify_math
from sppo_lightning.verification.refusals import why_ill_formed


class MathVerifier(Verifier):
    r"""Scores 1.0 where the final answer of a response equals the gold answer, else 0.0.

    The answer stands in the last `\boxed{…}`, after the last `####` or after "Answer:", behind any
    `</think>`. Numbers are compared exactly; the rest goes to math-verify in worker processes. A comparison
    that takes too long scores 0.0; a gold answer that cannot be read, or a worker that crashes, gives no
    verdict.

    Args:
        timeout_seconds: Time that one comparison may take in a worker before it is killed.
        workers: Number of worker processes, started by the first comparison that needs one.
        numeric_tolerance: Relative distance up to which two numbers are equal, such as 0.01 for answers that were
            measured or rounded; exactly equal by default.
        truncated: A response that was cut off is "unanswered", which scores 0, or "scored" as any other.
        **settings: Those of every verifier: see `Verifier`.
    """

    scores_early = True

    def __init__(
        self,
        timeout_seconds: float = 2.0,
        workers: int = 2,
        numeric_tolerance: float = 0.0,
        truncated: Truncated = "unanswered",
        **settings: Any,
    ) -> None:
        super().__init__(truncated=truncated, **settings)
        if not timeout_seconds > 0:
            raise InputError(f"`MathVerifier.timeout_seconds`={timeout_seconds} is no time; use 2.0.")
        if workers < 1:
            raise InputError(f"`MathVerifier.workers`={workers} leaves nobody to compare answers; use 1 or more.")
        if not 0 <= numeric_tolerance < 1:
            raise InputError(
                f"`MathVerifier.numeric_tolerance`={numeric_tolerance} is no relative distance; use 0 to 1."
            )
        self.timeout_seconds = timeout_seconds
        self.workers = workers
        self.numeric_tolerance = numeric_tolerance

    def unusable(self, prompt: Prompt) -> str | None:
        """A gold answer that is empty, too long or cut off in the middle of a formula."""
        return why_ill_formed(prompt.gold)

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """1.0, 0.0, or `None` where the gold answer cannot be read or a worker crashed."""
        verdicts = verify_math(
            responses,
            [prompt.gold for prompt in prompts],
            timeout_seconds=self.timeout_seconds,
            workers=self.workers,
            numeric_tolerance=self.numeric_tolerance,
        )
        self.counts["timeouts"] += sum(verdict.status == "timeout" for verdict in verdicts)
        self.counts["errors"] += sum(verdict.status == "crashed" for verdict in verdicts)
        return [verdict.score for verdict in verdicts]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the thread that scores early, and the worker processes."""
        super().teardown(trainer, pl_module, stage)
        close_workers()
