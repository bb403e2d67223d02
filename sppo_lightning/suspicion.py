"""What the responses of a batch say about reward hacking: sums that ranks can add up, and the worst examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sppo_lightning.batch import Rollouts, Scores
from sppo_lightning.evaluation import digest
from sppo_lightning.verification.hacking import Reading

Sum = tuple[float, float, float]
_REASON = 0.25  # what a suspicious text weighs against a check that gives 1 less than the reward


@dataclass
class Record:
    """Figures of one batch, or of several put together.

    A sum is the total of some observations, how many they are, and the total of their squares.
    """

    sums: dict[str, Sum] = field(default_factory=dict)  # of each figure, by the metric's name without `hacking/`
    scores: dict[str, Sum] = field(default_factory=dict)  # of the run's own verifiers, by their names
    failures: dict[str, int] = field(default_factory=dict)  # responses that a check failed on, by its name
    said: list[tuple[str, int, int]] = field(default_factory=list)  # data set, row and digest of each response
    causes: dict[str, str] = field(default_factory=dict)  # why checks failed, by their names
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, figure: str, values: Iterable[float]) -> None:
        """Add observations of a figure."""
        self.sums[figure] = _plus(self.sums.get(figure), _sum(values))

    def read(self, rollouts: Rollouts, readings: Sequence[Reading], min_reasoning_characters: int) -> None:
        """Add what the texts look like."""
        pairs = zip(rollouts.prompts, rollouts.responses, strict=True)
        self.said += [(p.dataset, p.row, digest(" ".join(text.split()))) for p, text in pairs]
        self.add("response_tokens", rollouts.response_mask.sum(1).tolist())
        self.add("repeated_ngrams", [reading.repeated for reading in readings])
        self.add("candidate_spam", [float(reading.candidates) for reading in readings])
        correct = zip(readings, rollouts.correct.tolist(), strict=True)
        short = [reading.reasoning_characters < min_reasoning_characters for reading, right in correct if right]
        self.add("without_reasoning", map(float, short))

    def score(self, scores: Mapping[str, Scores]) -> None:
        """Add the scores of the run's own verifiers, where they gave a verdict."""
        for name, each in scores.items():
            found = _sum(value for value in each.values[each.counts].tolist() if not math.isnan(value))
            self.scores[name] = _plus(self.scores.get(name), found)

    def compare(self, name: str, rewards: Sequence[float], scores: Sequence[float | None]) -> None:
        """Add what a check says, beside the rewards of the same responses; NaN and None are no verdicts."""
        pairs = [(r, s) for r, s in zip(rewards, scores, strict=True) if s is not None and not math.isnan(r)]
        self.add(f"{name}/score", [score for _, score in pairs])
        self.add(f"{name}/gap", [reward - score for reward, score in pairs])
        self.add(f"{name}/disagreement", [float(reward >= 1 and score < 0.5) for reward, score in pairs])

    def metrics(self) -> dict[str, float]:
        """What is logged, by the metric's name without `hacking/`."""
        return means(self.sums) | {f"{name}/failures": float(number) for name, number in self.failures.items()}

    def distinct(self) -> Sum:
        """Different responses, and how many there are when a prompt's equal ones count once."""
        once = set(self.said)
        different = float(len({text for _, _, text in once}))
        return different, float(len(once)), different


def _sum(values: Iterable[float]) -> Sum:
    found = list(values)
    return math.fsum(found), len(found), math.fsum(value * value for value in found)


def _plus(one: Sum | None, other: Sum) -> Sum:
    return other if one is None else (one[0] + other[0], one[1] + other[1], one[2] + other[2])


def merge(records: Iterable[Record]) -> Record:
    """All records as one; the same on every rank that is given the same ones in the same order."""
    merged = Record()
    for record in records:
        for ours, theirs in ((merged.sums, record.sums), (merged.scores, record.scores)):
            ours |= {name: _plus(ours.get(name), each) for name, each in theirs.items()}
        for name, number in record.failures.items():
            merged.failures[name] = merged.failures.get(name, 0) + number
        merged.causes = record.causes | merged.causes
        merged.said += record.said
        merged.examples += record.examples
    return merged


def means(sums: Mapping[str, Sum]) -> dict[str, float]:
    """The mean of each figure with an observation."""
    return {figure: total / count for figure, (total, count, _) in sums.items() if count}


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def suspects(
    rollouts: Rollouts,
    readings: Sequence[Reading],
    checked: Mapping[str, Sequence[float | None]],
    min_reasoning_characters: int,
    iteration: int,
) -> list[dict[str, Any]]:
    """The rewarded responses that a check gives less, or whose text is suspicious, as an example each.

    `suspicion` is the reward less the lowest check, or 0 where that is more, and a quarter for each reason in the
    text.
    """
    found = []
    for row, (prompt, reward) in enumerate(zip(rollouts.prompts, rollouts.rewards.tolist(), strict=True)):
        if not reward > 0:  # without a verdict neither
            continue
        checks = {name: scores[row] for name, scores in checked.items()}
        lower = {name: score for name, score in checks.items() if score is not None and score < reward}
        texts = readings[row].reasons(min_reasoning_characters)
        if lower or texts:
            found.append(
                {
                    "iteration": iteration,
                    "suspicion": reward - min(lower.values(), default=reward) + _REASON * len(texts),
                    "reasons": [*(f"{name} gives {score:.2f}" for name, score in lower.items()), *texts],
                    "dataset": prompt.dataset,
                    "row": prompt.row,
                    "reward": reward,
                    "checks": checks,
                    "gold": prompt.gold,
                    "prompt": prompt.text,
                    "response": rollouts.responses[row],
                }
            )
    return found


def worst(examples: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The most suspicious examples first, of equal ones the newest, and no response to a prompt twice."""
    found: list[dict[str, Any]] = []
    seen: set[tuple[str, int, str]] = set()
    for example in sorted(examples, key=lambda each: (-each["suspicion"], -each["iteration"])):
        key = (example["dataset"], example["row"], example["response"])
        if key not in seen:
            found.append(example)
            seen.add(key)
    return found[:count]
