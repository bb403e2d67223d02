r"""The final answer of a response, found in linear time by marks that are set on purpose.

Nothing is guessed: no number is taken out of running text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_ANSWER_CHARS = 512

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\.|[{}]", re.DOTALL)
_MARK = re.compile(r"\banswer[*_ ]{0,4}:|\bfinal answer is:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z])")
_JOINT = re.compile(
    r"(?:[\s$.,;()*|&/•-]|\\[\\()\[\],;! ]|\\q?quad(?![A-Za-z])|\\text\s?\{\s?(?:or|and)\s?\}|\b(?:or|and)\b)"
    r"{0,200}"
)


class Box(NamedTuple):
    """A box of a response."""

    start: int  # of its command
    end: int  # behind its closing brace
    content: str


def boxes(text: str) -> list[Box]:
    r"""The `\boxed{…}` and `\fbox{…}` that stand in no other one; none where the last one is never closed."""
    first = _BOX.search(text)
    if first is None:
        return []
    found: list[Box] = []
    open_braces: list[tuple[int, int]] = []  # where a box's command and content start; -1 for any other brace
    depth = 0  # of boxes in boxes
    last_is_closed = True
    for token in _BRACES.finditer(text, first.start()):
        symbol = token.group()
        if symbol == "{":
            open_braces.append((-1, -1))
        elif symbol[-1] == "{" and len(symbol) > 2:
            open_braces.append((token.start(), token.end()))
            depth += 1
            last_is_closed = False
        elif symbol == "}" and open_braces:
            start, content = open_braces.pop()
            if start >= 0:
                depth -= 1
                last_is_closed = True
                if depth == 0:
                    found.append(Box(start, token.end(), text[content : token.start()]))
    return found if last_is_closed else []


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` or `\fbox{…}`; `None` without one or where it is never closed."""
    found = boxes(text)
    return found[-1].content if found else None


def extract_answer(response: str) -> str | None:
    r"""The final answer of a response, or `None` where it gives none.

    Only the text after the last `</think>` counts: its last `\boxed{…}`, without any box the rest of the line
    after the last `####`, without that the rest of the last line with "Answer:" or "final answer is". Boxes
    side by side, with nothing but "or", "and" or commas between them, are one answer of several. An answer that
    is empty or longer than 512 characters is none.
    """
    text = response.rpartition("</think>")[2].partition("<think>")[0]
    if _BOX.search(text):
        answer = _boxed_answer(text)
    elif (at := text.rfind("####")) >= 0:
        answer = _line(text, at + 4)
    else:
        marks = list(_MARK.finditer(text))
        answer = _line(text, marks[-1].end()) if marks else ""
    answer = answer.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _boxed_answer(text: str) -> str:
    """The last box, with those before it that are joined to it and say something else."""
    found = boxes(text)
    if not found or not found[-1].content.strip():
        return ""
    contents = [found[-1].content.strip()]
    for box, after in zip(found[-2::-1], found[:0:-1], strict=True):
        if not _JOINT.fullmatch(text, box.end, after.start):
            break
        if (content := box.content.strip()) not in contents:
            contents.insert(0, content)
    return ", ".join(contents)


def _line(text: str, start: int) -> str:
    """What the line says from `start` on, without emphasis and what follows the first sentence."""
    line = text[start:].split("\n", 1)[0]
    if mark := _MARK.match(line.lstrip("*_ ")):  # "#### Answer: 42"
        line = line.lstrip("*_ ")[mark.end() :]
    sentence = _SENTENCE_END.split(line.strip(), maxsplit=1)[0]
    return sentence.strip().strip("*_").removesuffix(".").rstrip().rstrip("*_")
