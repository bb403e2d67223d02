"""A verifier for answers that are right in one spelling only."""

from __future__ import annotations

from typing import Any, Literal

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Truncated, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification.extraction import extract_boxed


class ExactMatch(Verifier):
    r"""Scores 1.0 where the answer is the gold answer character by character, up to white space, else 0.0.

    Args:
        extract: What the answer is: "boxed" for the content of the last `\boxed{…}`, "whole" for the response.
        truncated: A response that was cut off is "unanswered", which scores 0, or "scored" as any other.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(
        self,
        extract: Literal["boxed", "whole"] = "boxed",
        truncated: Truncated = "unanswered",
        **settings: Any,
    ) -> None:
        super().__init__(truncated=truncated, **settings)
        if extract not in ("boxed", "whole"):
            raise InputError(f'`ExactMatch.extract`={extract!r} is unknown; use "boxed" or "whole".')
        self.extract = extract

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """1.0 or 0.0; without an answer 0.0, and no verdict where the prompt has no gold answer."""
        return [self._match(prompt.gold, text) for prompt, text in zip(prompts, responses, strict=True)]

    def _match(self, gold: str, response: str) -> float | None:
        wanted = gold.split()
        if not wanted:
            return None
        answer = extract_boxed(response) if self.extract == "boxed" else response
        return float(answer is not None and answer.split() == wanted)
