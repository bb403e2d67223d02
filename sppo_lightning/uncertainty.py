"""How unsure one is of the pass rate p of each prompt, before its responses are known, and where to sample more."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import check_decay
from sppo_lightning.experience import Experience
from sppo_lightning.ranks import gather_objects
from sppo_lightning.records import PromptRecords

_DIGITS = 9  # of gains that are compared: with fewer or more ranks, the last ones are others


@dataclass(frozen=True, slots=True)
class Belief:
    """What is thought of a prompt's p: `Beta(k·m, k·(1 − m))`."""

    mean: float  # m
    strength: float  # k, in responses

    def variance(self, responses: int = 0) -> float:
        """The expected variance of p after so many more: `m (1 − m) k / ((k + 1) (k + responses))`."""
        k = self.strength
        return self.mean * (1 - self.mean) * k / ((k + 1) * (k + responses))


class Uncertainty(ABC):
    """Says what is believed of each prompt's pass rate; may learn from what becomes of the responses."""

    @abstractmethod
    def beliefs(self, prompts: Sequence[Prompt], values: Sequence[float], prior_strength: float) -> list[Belief]:
        """What is believed of `B` prompts before their responses.

        Args:
            prompts: `B`.
            values: `B`, the critic's V.
            prior_strength: How many responses V counts as in the baseline.
        """

    def learn(self, experience: Experience) -> None:  # noqa: B027 (most have nothing to learn)
        """Learn from this rank's part of an iteration, after its updates; a collective."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, the same on every rank, in plain types."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Go on where a checkpoint was saved."""


class CriticVariance(Uncertainty):
    """The critic alone: V counts as so many responses as in the baseline, for every prompt alike."""

    def beliefs(self, prompts: Sequence[Prompt], values: Sequence[float], prior_strength: float) -> list[Belief]:
        """`m = V`, `k = prior_strength`; see `Uncertainty`."""
        return [Belief(value, prior_strength) for value in values]


class RecordVariance(Uncertainty):
    """The critic's V as a prior, and the prompt's own record: a prompt that was visited often is surer.

    All ranks keep the same record of all prompts, two numbers each.

    Args:
        decay: What is left of a prompt's rewards and responses at its next visit, because the policy has moved on.
    """

    def __init__(self, decay: float = 0.8) -> None:
        check_decay(self, "decay", decay)
        self.records = PromptRecords(decay)

    def beliefs(self, prompts: Sequence[Prompt], values: Sequence[float], prior_strength: float) -> list[Belief]:
        """`m = (k V + s) / (k + n)`, of strength `k + n`, with the record's s of n; see `Uncertainty`."""
        found = []
        for prompt, value in zip(prompts, values, strict=True):
            strength = prior_strength + self.records.of(prompt.key)[1]
            found.append(Belief(self.records.mean(prompt.key, prior_strength, value), strength))
        return found

    def learn(self, experience: Experience) -> None:
        """Enter the rewards of all ranks in the records; see `Uncertainty`."""
        rows = zip(
            experience.rollouts.prompts, experience.rewards.tolist(), experience.verdicts.tolist(), strict=True
        )
        own = [(prompt.key, reward) for prompt, reward, verdict in rows if verdict]
        # sorted, because sums depend on the order, and the order of ranks on how many there are
        self.records.enter(sorted(row for part in gather_objects(own) for row in part))

    def state_dict(self) -> dict[str, Any]:
        """The records."""
        return self.records.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved."""
        self.records.load_state_dict(state_dict)


def allocate(beliefs: Sequence[Belief], responses: int, most: int) -> list[int]:
    """How many further responses each prompt gets, of so many in all and `most` for each.

    One after the other goes to where it is expected to lower the variance most, to the first of equals, and nowhere
    where it lowers none. As the gains of a prompt fall, no other division lowers the sum of the variances more.
    """

    def gain(place: int) -> float:
        belief, so_far = beliefs[place], given[place]
        return round(belief.variance(so_far) - belief.variance(so_far + 1), _DIGITS)

    given = [0] * len(beliefs)
    queue = [(-gain(place), place) for place in range(len(beliefs))]
    heapq.heapify(queue)
    while responses > 0 and queue and queue[0][0] < 0:
        _, place = heapq.heappop(queue)
        given[place] += 1
        responses -= 1
        if given[place] < most:
            heapq.heappush(queue, (-gain(place), place))
    return given
