"""Figures over training, and when one of them has moved so far that somebody should look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from sppo_lightning.errors import InputError


class Series:
    """A mean over the last entries, what it was at first, and the lowest that it has been.

    There is none of the three before `window` entries are in.

    Args:
        window: Entries that the mean is over.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.entries: list[tuple[float, float, float]] = []  # of each, as `add` has it, the newest last
        self.first: float | None = None  # mean over the first window
        self.lowest: float | None = None  # of the means over a window

    def add(self, total: float, count: float, squares: float = 0.0) -> None:
        """Add an entry: a sum over so many observations, and that of their squares; one without any is left out."""
        if not count:
            return
        self.entries = [*self.entries, (total, count, squares)][-self.window :]
        if (recent := self.recent) is not None:
            self.first = recent if self.first is None else self.first
            self.lowest = recent if self.lowest is None else min(self.lowest, recent)

    @property
    def recent(self) -> float | None:
        """Mean of the observations of the last `window` entries."""
        if len(self.entries) < self.window:
            return None
        return sum(total for total, _, _ in self.entries) / sum(count for _, count, _ in self.entries)

    @property
    def error(self) -> float:
        """Standard error of `recent`, by the spread of the observations; 0 where their squares are not known."""
        count = sum(count for _, count, _ in self.entries)
        variance = sum(squares for _, _, squares in self.entries) / count - (self.recent or 0.0) ** 2
        return math.sqrt(max(variance, 0.0) / count)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types."""
        return {"entries": list(self.entries), "first": self.first, "lowest": self.lowest}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was saved."""
        self.entries = [(total, count, squares) for total, count, squares in state_dict["entries"]][-self.window :]
        self.first, self.lowest = state_dict["first"], state_dict["lowest"]


@dataclass(frozen=True)
class Limits:
    """How far each figure's recent mean may move before there is an alarm; null for never.

    A rise must also be four standard errors of the recent mean, or few responses would alarm by chance.

    Args:
        gap_growth: Rise of a check's gap over the smallest that it was, in the unit of the reward.
        held_out_growth: Rise of a verifier's train-minus-held-out gap over the smallest that it was, in the unit of
            the reward: a shaping score's times its weight.
        length_share: Response length over what it was at first.
        distinct_share: Share of distinct responses over what it was at first.
        repetition_growth: Rise of the share of repeated n-grams over what it was at first.
        without_reasoning_growth: Rise of the share of correct responses without reasoning over what it was at
            first.
        spam_growth: Rise of the share of responses that offer several answers over what it was at first.
    """

    gap_growth: float | None = 0.1
    held_out_growth: float | None = 0.15
    length_share: float | None = 0.4
    distinct_share: float | None = 0.5
    repetition_growth: float | None = 0.2
    without_reasoning_growth: float | None = 0.2
    spam_growth: float | None = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not value > 0 or (field.name.endswith("_share") and value > 1):
                allowed = "above 0 and at most 1" if field.name.endswith("_share") else "above 0"
                raise InputError(
                    f"`HackingMonitor.limits.{field.name}`={value} would alarm without a cause; use a number "
                    f"{allowed}, or null for no alarm."
                )


class Alarm(NamedTuple):
    """A figure that went past its limit."""

    figure: str  # the metric's name without `hacking/`
    sentence: str


_ERRORS = 4.0  # since what is compared with may be the smallest of many means


class _Rule(NamedTuple):
    figure: str  # its name, or how it ends
    limit: str  # the setting; a share of what was at first, or a rise over it
    from_lowest: bool  # the rise counts from the lowest that the figure was
    look_at: str


_RULES = (
    _Rule("response_tokens", "length_share", False, "responses get short, so see whether they still give reasons"),
    _Rule("distinct_responses", "distinct_share", False, "different prompts get equal responses, so see which"),
    _Rule("repeated_ngrams", "repetition_growth", False, "responses repeat themselves, so see what rewards length"),
    _Rule("without_reasoning", "without_reasoning_growth", False, "correct responses give no reasons, so see how"),
    _Rule("candidate_spam", "spam_growth", False, "responses offer several answers, so see whether one is picked"),
    _Rule("/gap", "gap_growth", True, "the reward rises where this check does not, so see what they disagree on"),
    _Rule("/train_minus_held_out", "held_out_growth", True, "it rises in training alone, so see if answers leak"),
)


def alarms(series: Mapping[str, Series], limits: Limits) -> Iterator[Alarm]:
    """The figures whose recent mean is past its limit.

    Args:
        series: By the metric's name without `hacking/`; those that no limit is about are passed over.
        limits: How far each may move.
    """
    for name, each in series.items():
        rule = next((rule for rule in _RULES if name.endswith(rule.figure)), None)
        start = each.lowest if rule and rule.from_lowest else each.first
        limit: float | None = getattr(limits, rule.limit) if rule else None
        recent = each.recent
        if rule is None or limit is None or start is None or recent is None:
            continue
        falls = rule.limit.endswith("_share")
        bound = limit * start if falls else start + limit
        if recent < bound if falls else recent > max(bound, start + _ERRORS * each.error):
            origin = "at its lowest" if rule.from_lowest else "in the first iterations"
            yield Alarm(
                name,
                f"`hacking/{name}` has a recent mean of {recent:.3g}, {'below' if falls else 'above'} {bound:.3g}, "
                f"where `limits.{rule.limit}`={limit:g} puts the limit from {start:.3g} {origin}: {rule.look_at}",
            )
