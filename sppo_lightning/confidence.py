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

_CHARACTER_TOKENS = 4  # the most that one character is cut into: the bytes of UTF-8

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
        probabilities = rollouts.sampled_log_probs.double().exp().clamp(max=1.0).cpu()
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

    def begin(token: int) -> int:  # of the token's text; rests are decoded since answers stand near the end
        return len(response) - len(rest(token))

    places = range(len(ids) + 1)
    first = bisect_right(places, answer.start, key=begin) - 1
    last = bisect_left(places, answer.end, key=begin)
    earliest = max(first - _CHARACTER_TOKENS, -1)
    for start in range(first, earliest, -1):  # inside a character nothing is confirmed
        if response.endswith(rest(start)) and begin(start) <= answer.start:
            return slice(start, last) if start < last and response.endswith(rest(last)) else None
    return None
