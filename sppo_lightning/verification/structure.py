"""What canonical text is made of: lists, sets, intervals, vectors, names, options and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sppo_lightning.verification.numbers import exact_number, quantity


class Group(NamedTuple):
    """Several things in an order, or in none."""

    kind: str  # "list", "set", "union", "named" (x=1, y=2), "matrix …" with its shape, or the brackets, as in "(]"
    items: tuple[str, ...]


_OPEN, _CLOSE = "([{⟨⦃", ")]}⟩⦄"


def split(text: str, separators: str) -> list[str]:
    """Text at the separators that stand in no brackets; empty parts are left out."""
    parts, depth, start = [], 0, 0
    for place, symbol in enumerate(text):
        if symbol in _OPEN:
            depth += 1
        elif symbol in _CLOSE:
            depth -= 1
        elif depth == 0 and symbol in separators:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def sides_of(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; the text alone where it is none, or lacks a side."""
    sides = split(text, "=")
    return sides if text.count("=") < len(sides) else [text]


def items_of(text: str) -> tuple[str, ...]:
    """The items of a list without brackets; `3±x` is two."""
    found: list[str] = [text]
    if ";" in text or "," in text:
        found = []
        for item in split(text, ";"):  # a comma may belong to a number, as in `$1,234`
            found += [item] if exact_number(quantity(item).body) is not None else split(item, ",")
    return tuple(each for item in found for each in _both_signs(item)) or (text,)


def _both_signs(item: str) -> tuple[str, ...]:
    """`3±x` as its two values; anything else as it is."""
    if item.count("±") + item.count("∓") != 1 or group_of(item) is not None:
        return (item,)
    return tuple(_without_plus(re.sub("[±∓]", sign, item)) for sign in "+-")


def _without_plus(text: str) -> str:
    return re.sub(r"(^|[({=])\+", r"\1", text)


_MATRIX = re.compile(
    r"(?P<factor>(?:[0-9A-Za-z/+-]|\\frac\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\})*)×?[(\[]?"
    r"\\begin\{(?P<kind>(?:small|p|b|B)?matrix|array)\}(?:\{[clr|]*\})?(?P<body>.*)\\end\{(?P=kind)\}[)\]]?",
    re.DOTALL,
)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_RELATION = re.compile(r"([<>≤≥])")
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?!infty|pi)[a-z]+ ?)(?:_\w|_\{\w+\}|\([A-Za-z]\))?")
_MEMBER = re.compile(rf"{_VARIABLE.pattern}∈")
_BUILDER = re.compile(rf"⦃({_VARIABLE.pattern})(?:∈\\mathbb\{{R\}})?[|:](.*)⦄")
_BRACKETS = {"(": ")]", "[": ")]", "⟨": "⟩", "⦃": "⦄"}


def group_of(text: str) -> Group | None:
    """The group that canonical text of one item stands for, or `None` for an expression or a word."""
    text = _MEMBER.sub("", text, count=1)
    if builder := _BUILDER.fullmatch(text):
        text = builder[2]
    if text == r"\mathbb{R}":
        return Group("()", (r"-\infty", r"\infty"))
    if len(parts := split(text, "∪")) > 1:
        return Group("union", tuple(parts))
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(matrix["body"], matrix["factor"])
    if (relation := relation_of(text)) is not None:
        return relation[1]
    if len(parts := split(text, "∖")) == 2:
        return _without(group_of(parts[0]), group_of(parts[1]))
    if len(parts := split(text, ":")) > 1 and not re.search("[A-Za-z]", _COMMAND.sub("", text)):
        return Group(":", tuple(parts))
    if text[:1] in _BRACKETS and text[-1:] in _BRACKETS[text[0]] and len(split(text, "")) == 1:
        return _bracketed(text)
    return None


def _bracketed(text: str) -> Group | None:
    inner = text[1:-1]
    if _depth_falls_below_zero(inner):
        return None  # (x+1)(x-1)
    if text[0] == "⦃":
        return Group("set", items_of(inner)) if inner else None
    # a comma without a space may belong to a number only where other items are told apart by more
    items = items_of(inner) if ";" in inner else tuple(split(inner, ","))
    if len(items) < 2:
        return Group("[", items) if text[0] == "[" else None  # [5] is not 5, but (5) is
    return Group("()" if text[0] == "⟨" else text[0] + text[-1], items)


def _depth_falls_below_zero(text: str) -> bool:
    depth = 0
    for symbol in text:
        depth += (symbol in _OPEN) - (symbol in _CLOSE)
        if depth < 0:
            return True
    return False


def _matrix(body: str, factor: str) -> Group:
    """A matrix row by row, times what stands before it; one column is a vector, which is as good as a tuple."""
    rows = [[cell.strip() for cell in row.split("&")] for row in _ROW_END.split(body) if row.strip()]
    factor = "-1" if factor == "-" else factor
    cells = tuple(f"{factor}×({cell})" if factor else cell for row in rows for cell in row)
    if len(rows) > 1 and all(len(row) == 1 for row in rows):
        return Group("()", cells)
    return Group("matrix " + " ".join(str(len(row)) for row in rows), cells)


Relation = tuple[str, Group]  # a variable, and the interval that it is in
_INTERVALS = ("()", "(]", "[)", "[]")


def relation_of(text: str) -> Relation | None:
    """The variable of an inequality, and the interval that it says it is in."""
    if len(both := split(text, "∧")) == 2:
        return _together(*map(relation_of, both))
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[2]) and not _VARIABLE.fullmatch(parts[0]):
        parts = _turned(parts)
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[0]) and parts[0] not in parts[2]:
        variable, sign, end = parts
        ends = ("(", r"-\infty", end, "]" if sign == "≤" else ")")
        if sign in ">≥":
            ends = ("[" if sign == "≥" else "(", end, r"\infty", ")")
    elif len(parts) == 5 and _VARIABLE.fullmatch(parts[2]):
        parts = _turned(parts) if parts[1] in ">≥" else parts
        low, first, variable, second, high = parts
        if first not in "<≤" or second not in "<≤":
            return None
        ends = ("[" if first == "≤" else "(", low, high, "]" if second == "≤" else ")")
    else:
        return None
    return variable, Group(ends[0] + ends[3], (ends[1], ends[2]))


def _together(first: Relation | None, second: Relation | None) -> Relation | None:
    """`x > 1` and `x < 5` as one interval."""
    if not first or not second or first[0] != second[0]:
        return None
    low, high = (first[1], second[1]) if first[1].items[1] == r"\infty" else (second[1], first[1])
    if low.items[1] != r"\infty" or high.items[0] != r"-\infty":
        return None
    return first[0], Group(low.kind[0] + high.kind[1], (low.items[0], high.items[1]))


def _without(whole: Group | None, hole: Group | None) -> Group | None:
    """An interval without one point or one interval inside it, as the union of what is left."""
    if not whole or not hole or len(whole.items) != 2 or whole.kind not in _INTERVALS:
        return None
    if hole.kind == "set" and len(hole.items) == 1:
        ends, closing = (hole.items[0], hole.items[0]), ")("
    elif hole.kind in _INTERVALS and len(hole.items) == 2:
        ends = (hole.items[0], hole.items[1])
        closing = (")" if hole.kind[0] == "[" else "]") + ("(" if hole.kind[1] == "]" else "[")
    else:
        return None
    left = f"{whole.kind[0]}{whole.items[0]};{ends[0]}{closing[0]}"
    right = f"{closing[1]}{ends[1]};{whole.items[1]}{whole.kind[1]}"
    return Group("union", (left, right))


def _turned(parts: Sequence[str]) -> list[str]:
    return [dict(zip("<>≤≥", "><≥≤", strict=True)).get(part, part) for part in reversed(parts)]


_OPTION = re.compile(
    r"(?:(?:option|choice)\s?)?(?:\(([A-J])\)|\[([A-J])\]|([A-J]))[).:]{0,2}"
    r"|(?:\\text\{)?\(?([A-J])\)\s?\}?\s?(?P<content>[^+-].*)",
    re.IGNORECASE,
)


def option_of(text: str) -> str | None:
    """The letter of a multiple-choice option: `(B)`, `B.`, `B) 42`; or `None`."""
    match = _OPTION.fullmatch(text)
    if match is None or (match["content"] and exact_number(quantity(match["content"]).body) is None):
        return None
    letter = next(group for group in match.groups() if group)
    return letter if letter.isupper() else None


_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
_ARGUMENT = re.compile(r"(?<=[A-Za-z'])\([^()]*\)")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_DENIAL = re.compile(r"\b(?:not|never|no|wrong|false|incorrect|cannot|isn.?t)\b", re.IGNORECASE)
_NO_NAME = re.compile(
    r"^-|[0-9^<>≤≥≠≈!:]|\\(?:sqrt|frac|binom|begin|sum|int|prod|pi|infty|ln|log|lg|exp|bar|hat|vec)(?![A-Za-z])"
)
_PLAIN_NAME = re.compile(r"(?:[A-Za-z]'*|\\[a-z]+ ?)(?:_\{[^{}]*\})?(?:\([A-Za-z0-9,+-]*\))?|\\text\{[A-Za-z ]+\}")


def is_name(side: str, value: str = "") -> bool:
    r"""Whether a side of an equation names what the other side says: `x`, `f(2)`, `m+n`, `\angle A`, `|S|`.

    Where `value`, what is sought, has unknowns itself, only a plain name is one: `xy=2x` is no statement of 2x.
    """
    if re.fullmatch(r"\|[a-z]\|", side) or _DENIAL.search(side):
        return False  # |x| = 5 says two things of x
    base = _ARGUMENT.sub("", _SUBSCRIPT.sub("", _TEXT.sub("W", side)))
    if _NO_NAME.search(base) or not re.search("[A-Za-z]", base) or base in ("e", "i"):
        return False
    letters = re.findall("[A-Za-z]", _COMMAND.sub("", base))
    if base.startswith("(") and letters != sorted(letters):
        return False  # (y, x)
    return not re.search("[A-DF-Za-df-hj-z]", _COMMAND.sub("", value)) or _PLAIN_NAME.fullmatch(side) is not None


_COMMAND = re.compile(r"\\(?!text)[A-Za-z]+")
_WORD = re.compile(
    r"\\text|(?<![A-Za-z])(?!(?:a?r?c?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|max|min|gcd|lcm|mod|det)\b)[A-Za-z]{3,}"
    r"|[A-Z][A-Za-z]+|(?<![A-Za-z])no(?![A-Za-z])"
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_POINT = re.compile(r"(?<![0-9])\.|\.(?![0-9])|[\s'\"]")


def is_words(text: str) -> bool:
    """Whether canonical text has words, which a computer algebra system would read as products of letters."""
    bare = _COMMAND.sub(" ", text)
    return (_WORD.search(bare) if len(bare) > 2 else _WORD.fullmatch(bare)) is not None


def words_of(text: str) -> str:
    """Words without case, articles, spaces and full stops."""
    return _POINT.sub("", _ARTICLE.sub("", _TEXT.sub(r"\1", text).strip().casefold()))


def as_group(items: Sequence[str]) -> Group | None:
    """Items without brackets as a group; one item is what it is by itself, or nothing."""
    if len(items) == 1:
        return group_of(items[0])
    if all(map(relation_of, items)):
        return Group("union", tuple(items))  # x < 1 or x > 5
    sides = [split(item, "=") for item in items]
    if all(len(each) == 2 and is_name(each[0]) for each in sides):
        if len({re.sub(r"_.*", "", name) for name, _ in sides}) == len(sides) > 1:
            return Group("named", tuple(items))  # x=1, y=2
        return Group("list", tuple(value for _, value in sides))  # x=1, x=2
    return Group("list", tuple(items))
