"""A shaping score for the steps of a response, not only for its answer."""

from __future__ import annotations

from typing import Any

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Role, Verifier
from sppo_lightning.verification.steps import StepScorer, step_quality


class StepQuality(Verifier):
    """Scores a response by the share of its steps that are valid, so that right answers by nonsense pay less.

    A step is valid where every arithmetic statement in it holds, such as "3 × 4 + 2 = 14", computed exactly; "1/3
    = 0.33" does not hold, "1/3 ≈ 0.33" does. Steps without a statement that is new in the response are not
    judged, and neither are statements with letters in them. A response of which nothing can be judged scores 0,
    so that saying nothing never pays more than right steps; use `applies_to` for data without arithmetic.

    Args:
        scorer: Judges each step too, from 0 to 1; a step is then worth the lower of that and of its arithmetic, and
            the score is the mean over all steps. Any `sppo_lightning.verification.steps.StepScorer`.
        role: "shaping" or "outcome", see `Verifier`.
        only_if_correct: Count only where the outcome verifiers listed before give full marks, so that steps can
            never pay more than being right.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(
        self,
        scorer: StepScorer | None = None,
        role: Role = "shaping",
        only_if_correct: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(role=role, only_if_correct=only_if_correct, **settings)
        self.scorer = scorer

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """From 0 to 1."""
        return [
            step_quality(prompt, response, self.scorer) for prompt, response in zip(prompts, responses, strict=True)
        ]
