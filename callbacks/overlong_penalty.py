"""A shaping score that makes responses end before they are cut off, as in DAPO."""

from __future__ import annotations

from torch import Tensor

from sppo_lightning.batch import Rollouts
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.errors import InputError


class OverlongPenalty(Verifier):
    r"""Takes up to 1 from responses that come close to the longest length, in proportion to how close.

    Counted in tokens, the end of sequence included: 0 up to `max_response_tokens − buffer_tokens`, from there
    linear down to −1 at `max_response_tokens`, and −1 beyond. It is a shaping score, so it is centred by its
    running mean and added to the advantage, whereas DAPO adds it to the reward before the advantage is taken.

    Source: DAPO, arXiv 2503.14476, section 3.4, equation 13.

    Args:
        max_response_tokens: Length from which on the penalty is whole, in tokens; usually
            `sampling.max_new_tokens` of RolloutGeneration.
        buffer_tokens: Length over which the penalty grows, in tokens.
        mask_truncated: Responses that were cut off (`finish_reason` is `length`) get no verdict, so that they teach
            nothing, instead of a penalty: DAPO's overlong filtering.
        weight: Weight of this verifier's scores among the shaping verifiers.
        name: Name in metrics and in `rollouts.scores`; `overlong_penalty` where none is given.
    """

    def __init__(
        self,
        max_response_tokens: int,
        buffer_tokens: int,
        mask_truncated: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, role="shaping", name=name)
        if not 0 <= buffer_tokens <= max_response_tokens:
            raise InputError(
                f"`OverlongPenalty.buffer_tokens`={buffer_tokens} is not within the {max_response_tokens} tokens "
                "of `max_response_tokens`; use a fifth of them."
            )
        self.max_response_tokens = max_response_tokens
        self.buffer_tokens = buffer_tokens
        self.mask_truncated = mask_truncated

    def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
        """From −1 to 0 by each response's length, and `None` for those that are masked."""
        lengths = rollouts.response_mask.sum(1)
        penalties = overlong_penalty(lengths, self.max_response_tokens, self.buffer_tokens).tolist()
        return [
            None if self.mask_truncated and reason == "length" else penalty
            for penalty, reason in zip(penalties, rollouts.finish_reasons, strict=True)
        ]


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """`[N]`, from −1 to 0, of responses of `lengths` `[N]` tokens (DAPO, equation 13)."""
    # without a buffer the first token beyond the limit costs it all
    return ((max_tokens - buffer_tokens - lengths) / max(buffer_tokens, 1)).clamp(-1.0, 0.0)
