"""A shaping score that depends on a response's length."""

from __future__ import annotations

from typing import Any

from sppo_lightning.batch import Rollouts
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification.lengths import LengthCurve


class LengthPenalty(Verifier):
    """Scores a response by its length in tokens, the end of sequence included, along a curve.

    It is a shaping score, so it is centred by its running mean and added to the advantage, whereas DAPO and
    others add it to the reward before the advantage is taken.

    Args:
        max_response_tokens: The longest length, in tokens; usually `sampling.max_new_tokens` of
            RolloutGeneration.
        curve: What each length is worth: `sppo_lightning.verification.lengths.Linear`, `.Overlong`, `.Cosine`, or
            any other `LengthCurve`. Under a curve that asks what is correct, a response whose outcome has no
            verdict has none here.
        mask_truncated: Responses that were cut off (`finish_reason` is `length`) get no verdict, so that they teach
            nothing, instead of a penalty: DAPO's overlong filtering.
        **settings: Those of every verifier but its role: see `Verifier`.
    """

    def __init__(
        self,
        max_response_tokens: int,
        curve: LengthCurve,
        mask_truncated: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(role="shaping", **settings)
        if max_response_tokens < 1:
            raise InputError(
                f"`LengthPenalty.max_response_tokens`={max_response_tokens} leaves no room for a response; use "
                "`sampling.max_new_tokens` of RolloutGeneration."
            )
        curve.check(max_response_tokens)
        self.max_response_tokens = max_response_tokens
        self.curve = curve
        self.mask_truncated = mask_truncated
        if curve.needs_correct:
            self.requires = self.requires | {"scores"}  # type: ignore[misc]

    def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
        """The curve's value at each response's length, and `None` for those that are masked or not judged."""
        n = len(rollouts)
        correct, judged = [False] * n, [True] * n
        if self.curve.needs_correct:
            correct, judged = rollouts.correct.tolist(), (~rollouts.rewards.isnan()).tolist()
        masked = [self.mask_truncated and reason == "length" for reason in rollouts.finish_reasons]
        lengths = rollouts.response_mask.sum(1).long().tolist()
        return [
            self.curve.value(lengths[i], self.max_response_tokens, correct[i])
            if judged[i] and not masked[i]
            else None
            for i in range(n)
        ]
