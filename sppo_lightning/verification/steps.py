"""The steps of a response, and how many of them are valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sppo_lightning.errors import InputError
from sppo_lightning.verification.statements import find_statements

if TYPE_CHECKING:  # it imports torch
    from sppo_lightning.batch import Prompt

MAX_CHARACTERS = 200_000  # of a response; what lies beyond is not read
MAX_STATEMENTS = 1000  # of a response; what comes after them is not judged

_ALIGNED = r"(?:align|aligned|equation|gather|gathered|multline|split)"  # whose lines are lines; a matrix's are not
_BREAK = re.compile(rf"</?think>|\\\\|\\(?:begin|end)\{{{_ALIGNED}\*?\}}|```[a-z]*")
_NUMBERED = re.compile(
    r"(?:#{1,6} {1,4})?[*_]{0,2}(?:step {1,4}[0-9]{1,3}|\(?[0-9]{1,3}[.)](?=[ *_]|$))[*_]{0,2} ?[:.)—–-]?[*_]{0,2}",
    re.IGNORECASE,
)
# a dash before a digit may be a minus
_BULLET = re.compile(r"(?:[*•]|#{1,6}|[-+](?= +[^ 0-9]))(?= )")
_SENTENCE_END = re.compile(r"(?<=[.?;]) +|(?<=!) +(?=[A-Z])")
_CONTINUES = ("=", "≈", r"\approx")


class StepScorer:
    """Judges the steps of a response, by a model for instance; a subclass writes `score_steps` and nothing else."""

    def score_steps(self, prompt: Prompt, steps: list[str]) -> list[float]:
        """How good each step is, from 0 to 1.

        Args:
            prompt: The prompt, with `gold` and the row's `metadata`.
            steps: The steps of one response that differ, at least one, in their order.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score_steps().")


def split_steps(response: str) -> list[str]:
    """The steps of a response that differ, in their order, those before `</think>` among them.

    Where at least two lines begin with "Step 1", "1." or "1)", a step goes from one such line to the next. Other
    lines, list items among them, are cut into sentences. A line that begins with a relation goes on with the one
    before.
    """
    parts: list[list[str]] = []
    for line in _BREAK.sub("\n", response[:MAX_CHARACTERS]).split("\n"):
        bare = line.strip(" \t\r&$")
        if bare.startswith(_CONTINUES) and parts:
            parts[-1].append(bare)
        elif bare:
            parts.append(line.split())
    lines = [" ".join(each) for each in parts]
    markers = [_NUMBERED.match(line) for line in lines]
    in_blocks = sum(marker is not None for marker in markers) > 1
    steps: list[list[str]] = []
    numbered = False
    for line, marker in zip(lines, markers, strict=True):
        start = marker or _BULLET.match(line)
        content = line[start.end() :].lstrip() if start else line
        if marker and in_blocks:
            steps.append([content])
            numbered = True
        elif numbered:
            steps[-1].append(content)
        else:
            steps += [[sentence] for sentence in _SENTENCE_END.split(content)]
    texts = ["\n".join(step).strip() for step in steps]
    different = {" ".join(text.casefold().split()): text for text in reversed(texts)}
    return [text for text in reversed(different.values()) if any(map(str.isalnum, text))]


def judge_arithmetic(steps: Sequence[str]) -> list[bool | None]:
    """Whether the arithmetic statements of each step all hold, `None` for a step without a new one.

    A statement that was made before, spelled alike or not, is no reason to count a step again.
    """
    seen: set[str] = set()
    verdicts: list[bool | None] = []
    for step in steps:
        found = find_statements(step) if len(seen) < MAX_STATEMENTS else []
        new = {statement.key for statement in found} - seen
        seen |= new
        verdicts.append(all(statement.holds for statement in found) if new else None)
    return verdicts


def step_quality(prompt: Prompt, response: str, scorer: StepScorer | None = None) -> float:
    """The share of valid steps among those that can be judged, from 0 to 1, and 0 where none can be.

    With a `scorer` every step can be judged: the mean over the steps of the lower of its score and the arithmetic
    verdict.

    Raises:
        InputError: Where the scorer gives anything but a number in [0, 1] for each step.
    """
    steps = split_steps(response)
    verdicts = judge_arithmetic(steps)
    if scorer is None:
        judged = [float(verdict) for verdict in verdicts if verdict is not None]
    else:
        scores = _scored(scorer, prompt, steps) if steps else []
        judged = [0.0 if verdict is False else score for verdict, score in zip(verdicts, scores, strict=True)]
    return sum(judged) / len(judged) if judged else 0.0


def _scored(scorer: StepScorer, prompt: Prompt, steps: list[str]) -> list[float]:
    scores = list(scorer.score_steps(prompt, steps))
    if len(scores) != len(steps) or not all(0 <= score <= 1 for score in scores):
        raise InputError(
            f"{type(scorer).__name__}.score_steps() gave {scores} for {len(steps)} steps of a response to row "
            f"{prompt.row} of {prompt.dataset!r}; return a number in [0, 1] for each."
        )
    return scores
