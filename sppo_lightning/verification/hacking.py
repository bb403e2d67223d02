"""Signs in a response's text that it was written for the verifier and not for the problem; nothing is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sppo_lightning.verification.code import last_code_block
from sppo_lightning.verification.extraction import MAX_ANSWER_CHARS, boxes, extract_answer

_MARKS = re.compile(
    r"</?think>|\\(?:boxed|fbox)\b|####|\b(?:the )?final answer(?: is)?\b|\banswer\b|```(?:python3?|py)?|[{}$*:.]",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"\banswer[*_ ]{0,4}:([^\n]{0,512})", re.IGNORECASE)
_WRAPPING = re.compile(r"\\(?:boxed|fbox)\b|[{}$*]")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])", re.IGNORECASE)
_NUMBER_OR_NUMBER = re.compile(r"[0-9][$*.]{0,3}\s{1,3}or\s{1,3}[$*+-]{0,3}[0-9]", re.IGNORECASE)
_REPEATED = 0.5  # share of repeated n-grams from which on an example is said to repeat itself


@dataclass(frozen=True)
class Reading:
    """What one response looks like."""

    repeated: float  # share of its n-grams that stood in it before
    reasoning_characters: int  # outside the final answer, white space and marks aside
    candidates: bool  # whether it offers several answers

    def reasons(self, min_reasoning_characters: int) -> list[str]:
        """What is suspicious about it, in words."""
        found = []
        if self.candidates:
            found.append("offers several answers")
        if self.reasoning_characters < min_reasoning_characters:
            found.append(f"{self.reasoning_characters} characters beside the answer")
        if self.repeated >= _REPEATED:
            found.append(f"{self.repeated:.0%} of its n-grams are repeats")
        return found


def read(response: str, gold: str, ngram_words: int = 4) -> Reading:
    """Everything that is looked for, in time linear in the text."""
    return Reading(
        repeated_share(response, ngram_words), reasoning_characters(response), offers_several(response, gold)
    )


def repeated_share(text: str, ngram_words: int = 4) -> float:
    """Share of the n-grams of words that stood in the text before; 0 where it has none."""
    words = text.split()
    count = len(words) - ngram_words + 1
    if count < 1:
        return 0.0
    different = set(zip(*(words[i:] for i in range(ngram_words)), strict=False))
    return 1.0 - len(different) / count


def reasoning_characters(text: str) -> int:
    r"""Characters outside the final answer, without white space and without what marks the answer.

    The answer is what `extract_answer` finds, or the last block of Python where it finds nothing. A response
    without either is all text.
    """
    answer = extract_answer(text)
    answer = last_code_block(text) if answer is None else answer
    return max(0, _visible(text) - _visible(answer or ""))


def _visible(text: str) -> int:
    return sum(map(len, _MARKS.sub(" ", text).split()))


def offers_several(response: str, gold: str) -> bool:
    r"""Whether what follows `</think>` offers more than one answer to choose from.

    That is: boxes with different contents, "answer:" lines that differ, or an "or" in the final answer. A gold
    answer that itself holds an "or" allows for that one.
    """
    text = response.rpartition("</think>")[2]
    if len({_squeezed(box.content) for box in boxes(text)}) > 1:
        return True
    lines = {_squeezed(match[1]) for match in _ANSWER_LINE.finditer(text)}
    if len(lines - {""}) > 1:
        return True
    if _OR.search(gold):
        return False
    answer = extract_answer(text)
    if answer is not None:
        return _OR.search(answer) is not None
    last_line = text.rstrip()[-MAX_ANSWER_CHARS:].rpartition("\n")[2]
    return _NUMBER_OR_NUMBER.search(last_line) is not None


def _squeezed(answer: str) -> str:
    return "".join(_WRAPPING.sub("", answer).split()).rstrip(".").casefold()
