"""How sure the policy is of its own answers: agreement among samples, probability of the tokens that say them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sppo_lightning.batch import Rollouts
from sppo_lightning.calibration import confidence_metrics
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.verification.extraction import find_answer

if TYPE_CHECKING:
    from sppo_lightning.evaluation import ProblemTable

# A character may be cut into 4 tokens, its bytes. What follows its middle begins with up to 3 signs for bytes
# that are left, so that a search by length goes wrong by up to 3 characters.
_ASTRAY = 12  # tokens

Pair = tuple[Tensor, Tensor]  # confidences and outcomes, [n] each, float64


@dataclass(frozen=True)
class PolicyConfidence:
    """The two confidences of a policy, and what is reported of them.

    Attributes:
        policy: Whose responses they are.
        tokens: Whether a response's confidence is that of the tokens of its final answer, or of all its tokens.
        bins: Of the calibration errors.
    """

    policy: CausalLMPolicy
    tokens: Literal["answer", "response"] = "answer"
    bins: int = 10

    def of(self, rollouts: Rollouts) -> Tensor:
        """`[N]`: mean probability, under the distribution sampled from, of each response's tokens that count.

        NaN for a response without an answer, or with one that is not found among its tokens.
        """
        found = []
        probabilities = rollouts.sampled_log_probs.cpu().double().exp().clamp(max=1.0)
        lengths = rollouts.response_mask.sum(1).long().tolist()
        ids = rollouts.response_ids.cpu()
        for row, (length, response) in enumerate(zip(lengths, rollouts.responses, strict=True)):
            place: slice | None = slice(0, length)
            if self.tokens == "answer":
                place = answer_tokens(self.policy.tokenizer, ids[row, :length].tolist(), response)
            found.append(math.nan if place is None else float(probabilities[row, place].mean()))
        return torch.tensor(found, dtype=torch.float64)

    def pairs(self, problems: ProblemTable) -> dict[str, Pair]:
        """Confidences and outcomes by kind; without the kinds of which these problems have nothing.

        `agreement` is about problems: the majority's share, and its reward. `token_probability` is about
        responses, each with its own reward.
        """
        found = {} if (agreement := problems.agreement()) is None else {"agreement": agreement}
        values, rewards = torch.cat(problems.confidences), torch.cat(problems.rewards)
        known = ~values.isnan()
        return found | ({"token_probability": (values[known], rewards[known])} if known.any() else {})

    def metrics(self, problems: ProblemTable) -> dict[str, float]:
        """`confidence_metrics` of both, each name behind its kind."""
        return {
            f"{kind}_{name}": value
            for kind, pair in self.pairs(problems).items()
            for name, value in confidence_metrics(*pair, self.bins).items()
        }


def answer_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], response: str) -> slice | None:
    """The tokens among `ids` that hold the final answer of `response`, which is their text.

    A token at the edge may say more than the answer. None where there is no answer, and where decoding does not
    confirm the place.
    """
    answer = find_answer(response)
    if answer is None:
        return None

    @cache
    def rest(token: int) -> str:
        return tokenizer.decode(ids[token:], skip_special_tokens=True)  # type: ignore[return-value]

    def begin(token: int) -> int:  # of its text; rests are decoded, since answers stand near the end
        return len(response) - len(rest(token))

    def confirmed(token: int) -> bool:  # not inside a character, nor where the text is another one
        return response.endswith(rest(token))

    places = range(len(ids) + 1)
    first = bisect_right(places, answer.start, key=begin) - 1
    last = bisect_left(places, answer.end, key=begin)
    starts = (t for t in range(first, max(first - _ASTRAY, 0) - 1, -1) if begin(t) <= answer.start and confirmed(t))
    ends = (t for t in range(max(last - _ASTRAY, 0), last + 1) if begin(t) >= answer.end and confirmed(t))
    start, end = next(starts, None), next(ends, None)
    return None if start is None or end is None else slice(start, end)
