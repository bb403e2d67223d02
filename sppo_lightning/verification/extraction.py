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


class Answer(NamedTuple):
    """The final answer of a response, and the characters that say it."""

    text: str
    start: int  # where several boxes are one answer, of the first one's content
    end: int  # and behind the last one's


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
    found = find_answer(response)
    return None if found is None else found.text


def find_answer(response: str) -> Answer | None:
    """The answer of `extract_answer`, and where in the response it stands."""
    rest = response.rpartition("</think>")[2]
    text, skipped = rest.partition("<think>")[0], len(response) - len(rest)
    found = None
    if _BOX.search(text):
        found = _boxed_answer(text)
    elif (at := text.rfind("####")) >= 0:
        found = _line(text, at + 4)
    elif marks := list(_MARK.finditer(text)):
        found = _line(text, marks[-1].end())
    if found is None or not 0 < len(found.text) <= MAX_ANSWER_CHARS:
        return None
    return Answer(found.text, skipped + found.start, skipped + found.end)


def _boxed_answer(text: str) -> Answer | None:
    """The last box, with those before it that are joined to it and say something else."""
    found = boxes(text)
    if not found or not found[-1].content.strip():
        return None
    first = last = found[-1]
    contents = [last.content.strip()]
    for box, after in zip(found[-2::-1], found[:0:-1], strict=True):
        if not _JOINT.fullmatch(text, box.end, after.start):
            break
        if (content := box.content.strip()) not in contents:
            contents.insert(0, content)
            first = box
    begin = last.end - 1 - len(last.content)  # a content ends before the closing brace
    return Answer(
        ", ".join(contents), first.end - 1 - len(first.content.lstrip()), begin + len(last.content.rstrip())
    )


def _line(text: str, start: int) -> Answer:
    """What the line says from `start` on, without emphasis and what follows the first sentence."""
    line = text[start:].split("\n", 1)[0]
    end = start + len(line)
    if mark := _MARK.match(line.lstrip("*_ ")):  # "#### Answer: 42"
        line = line.lstrip("*_ ")[mark.end() :]
    sentence = _SENTENCE_END.split(line.strip(), maxsplit=1)[0]
    answer = sentence.strip().strip("*_").removesuffix(".").rstrip().rstrip("*_").strip()
    begin = end - len(line.lstrip().lstrip("*_").lstrip())
    return Answer(answer, begin, begin + len(answer))
