"""The arithmetic statements of a text, such as "3 × 4 + 2 = 14", and whether they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sppo_lightning.verification.arithmetic import (
    MAX_DIGITS,
    PERCENT,
    Expression,
    Token,
    evaluate,
    parse,
    rounds_to,
)

MAX_CHARACTERS = 4000  # of a text; longer ones are not read

_END = r"(?![A-Za-z])"  # of a LaTeX command
_KINDS = {
    "space": r"\s(?<!\n)|[$&€£~]|\\[,;:!()\[\] $]|\\q?quad" + _END,
    # what changes nothing: sizes, boxes, bold type, degrees
    "skip": rf"\\(?:left|right|displaystyle|boxed|fbox|mathbf|bf){_END}|\^\\circ{_END}|\^\{{\\circ\}}|°",
    "number": r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3}){1,12}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+",
    "^": r"\^|(?<=[0-9)])\*\*(?=[0-9(-])|(?<=[0-9)] )\*\*(?= [0-9(-])",
    "bold": r"\*\*",
    "soft": r"\\(?:Rightarrow|implies|to|rightarrow|therefore|iff|neq?|leq?|geq?|lt|gt)"
    + _END
    + r"|[<>≤≥≠→⇒∴]+=?|=>|->|!=",
    "≈": rf"≈|\\(?:approx|simeq){_END}",
    "=": r"==?",
    "*": rf"[*×·⋅∗]|\\(?:times|cdot|ast){_END}|(?<=[0-9)] )[xX](?= [0-9(])|(?<=[1-9)])[xX](?=[0-9])",
    "/": rf"[/÷⁄]|\\div{_END}",
    "-": r"[-−]",
    "frac": rf"\\[dtc]?frac{_END}",
    "text": r"\\(?:text|textbf|textit|mathrm|mbox) ?\{[^{}]{0,80}\}",
    "%": r"\\?%",
    "sign": r"[+!]",
    "(": r"[(\[{]",
    ")": r"[)\]}]",
    "raised": r"[⁰¹²³⁴-⁹]+",
    "hard": r"\.{2,}|…|\\[A-Za-z]+|(?<=[0-9])[,:](?=[0-9])|(?<=[0-9] ):(?= [0-9])|(?<=[A-Za-z])'",
    "word": r"[^\W\d_]+",
    "soft2": r"[\n.,;:?\"'“”‘’`—]",
    "other": r"[\s\S]",
}
_TOKEN = re.compile("|".join(f"(?P<g{i}>{pattern})" for i, pattern in enumerate(_KINDS.values())))
_NAMES = dict(zip((f"g{i}" for i in range(len(_KINDS))), _KINDS, strict=True))
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_ARITHMETIC = frozenset({"number", "frac", *"+-*/^!%()"})
_RELATIONS = frozenset("=≈")
_OPERATORS = frozenset("+-*/^")

# words that compute something, or say that the number beside them is not the whole of its side
_PARTIAL = re.compile(
    r"(?i)\b(?:of|mod|modulo|times|plus|minus|over|divided|multiplied|by|than|to|into|from|sqrt|root|sin|cos|tan|log|ln"
    r"|exp|gcd|lcm|max|min|floor|ceil|abs|choose|squared|cubed|square|cube|twice|double|triple|percent|pi"
    r"|remainder|rem|with|base|hundred|thousand|million|billion|trillion|dozen|half|rounded|approximately|approx|about|between|factorial|negative|quotient)\b"
)
_CONNECTIVE = re.compile(r"(?i)\b(?:and|so|then|but|which|hence|thus|now|because|since|while|where)\b")


@dataclass(frozen=True)
class Statement:
    """An equality, or an approximate one, between two neighbouring sides."""

    key: str  # the same for statements that differ in spelling and order only
    holds: bool


def find_statements(text: str) -> list[Statement]:
    """The statements in `text` that can be judged, in their order.

    Of a chain `a = b = c` each link is one. A side with letters, or that may have more to it than the numbers, has
    no value, nor has one beyond the bounds of `arithmetic`; its links are left out. So are links on neither side of
    which anything is computed, and those with twice the same side. `≈` asks for a number on one of its sides,
    rounded correctly to the digits written, `=` for exact equality. Where only another reading of a percent sign
    ("3/4 · 100 = 75%") or of a last exclamation mark makes it true, there is no verdict.
    """
    if len(text) > MAX_CHARACTERS or not any(sign in text for sign in ("=", "≈", r"\approx", r"\simeq")):
        return []
    tokens = list(_tokens(text))
    found: list[Statement] = []
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and tokens[end].kind in _ARITHMETIC | _RELATIONS:
            end += 1
        if any(token.kind in _RELATIONS for token in tokens[start:end]):
            found += _links(tokens, start, end)
        start = end + 1
    return found


def _tokens(text: str) -> Iterator[Token]:
    glued = True
    for match in _TOKEN.finditer(text):
        kind, found = _NAMES[str(match.lastgroup)], match.group()
        if kind in ("skip", "bold"):
            continue
        if kind == "space":
            glued = False
            continue
        if kind == "raised":
            yield Token("^", found, glued)
            kind, found = "number", found.translate(_RAISED)
        elif kind == "text":
            kind, found, glued = "word", found.partition("{")[2].rstrip("}").strip(), False
        elif kind == "sign":
            kind = found
        elif kind in ("soft2", "other"):
            kind = {"soft2": "soft", "other": "hard"}[kind]
        if kind == "number":
            found = found.replace("{,}", ",")
            kind = "hard" if len(found) > MAX_DIGITS else kind
        yield Token(kind, found, glued)
        glued = True


def _links(tokens: Sequence[Token], start: int, end: int) -> Iterator[Statement]:
    """The statements among the tokens from `start` to `end`, which are of numbers and relations only."""
    sides: list[list[Token]] = [[]]
    relations: list[str] = []
    for token in tokens[start:end]:
        if token.kind in _RELATIONS:
            relations.append(token.kind)
            sides.append([])
        else:
            sides[-1].append(token)
    before = _strip_opened(sides[0])
    after = _strip_closed(sides[-1])
    expressions = [parse(side) for side in sides]
    if _continues_before(tokens, start, before, sides[0], expressions[0]):
        expressions[0] = None
    if _continues_after(tokens, end, after):
        expressions[-1] = None
    exclaimed = parse(sides[-1][:-1]) if sides[-1] and sides[-1][-1].kind == "!" else None
    for i, relation in enumerate(relations):
        left, right = expressions[i], expressions[i + 1]
        if left is None or right is None:
            continue
        holds = _holds(left, relation, right, exclaimed if i + 2 == len(sides) else None)
        sides_of = sorted((left.canonical, right.canonical))
        if holds is not None and (left.has_operator or right.has_operator) and sides_of[0] != sides_of[1]:
            yield Statement(relation.join(sides_of), holds)


def _strip_opened(side: list[Token]) -> bool:
    """Take the parentheses off that open around a whole statement, and say whether there were any."""
    count = 0
    for token in side[: max(_surplus(side), 0)]:
        if token.kind != "(":
            break
        count += 1
    del side[:count]
    return count > 0


def _strip_closed(side: list[Token]) -> bool:
    """The same at the end, where another may also open that holds a remark; says whether one does."""
    opened = bool(side) and side[-1].kind == "(" and not side[-1].glued
    if opened:
        del side[-1]
    for _ in range(-_surplus(side)):  # none where none is unmatched
        if side[-1].kind != ")":
            break
        del side[-1]
    return opened


def _surplus(side: Sequence[Token]) -> int:
    """How many more parentheses open than close."""
    return sum((token.kind == "(") - (token.kind == ")") for token in side)


def _continues_before(
    tokens: Sequence[Token], start: int, stripped: bool, side: Sequence[Token], expression: Expression | None
) -> bool:
    """Whether the first side of a run of tokens may have more to it before the run."""
    if not side:
        return True
    signed = side[0].kind == "-"
    if side[0].kind == "+" or (signed and len(side) > 1 and not side[1].glued):
        return True  # a term of what came before
    if start == 0:
        return False
    last = tokens[start - 1]
    if last.kind == "hard":
        return True
    bare = expression is not None and not expression.has_operator
    if last.kind == "soft":
        earlier = tokens[start - 2].kind if start > 1 else ""
        # a line that ends in an operator goes on, and "the mean of 3, 4, 5 = 12/3" is not about 5
        open_line = last.text == "\n" and earlier in _OPERATORS | _RELATIONS
        return open_line or (last.text == "," and earlier == "number" and bare)
    partial = len(last.text) < 2 or _PARTIAL.search(last.text) is not None
    # bare: "the area of a square of side 3 = 9"
    return partial or bare or (tokens[start].glued and not stripped) or (signed and side[0].glued)


def _continues_after(tokens: Sequence[Token], end: int, opened: bool) -> bool:
    """Whether the last side of a run of tokens may have more to it behind the run."""
    if end == len(tokens):
        return False
    following = tokens[end]
    if following.kind == "soft":
        return following.text == "?"  # which claims nothing
    if following.kind == "hard" or (following.glued and not opened):
        return True
    if len(following.text) < 2 or _PARTIAL.search(following.text):
        return True
    if _CONNECTIVE.search(following.text):
        return False
    ahead = [token for token in tokens[end + 1 : end + 3] if token.text.lower() != "and"]
    return bool(ahead) and ahead[0].kind == "number"  # "1 hour 30 minutes"


def _holds(left: Expression, relation: str, right: Expression, exclaimed: Expression | None) -> bool | None:
    holds = _compare(left, relation, right, PERCENT)
    if holds is not False:
        return holds
    if (left.has_percent or right.has_percent) and _compare(left, relation, right, Fraction(1)):
        return None
    if exclaimed is not None and _compare(left, relation, exclaimed, PERCENT):
        return None
    return False


def _compare(left: Expression, relation: str, right: Expression, percent: Fraction) -> bool | None:
    values = evaluate(left, percent), evaluate(right, percent)
    if values[0] is None or values[1] is None:
        return None
    if relation == "=" or values[0] == values[1]:
        return values[0] == values[1]
    verdicts = [rounds_to(values[0], right, percent), rounds_to(values[1], left, percent)]
    known = [verdict for verdict in verdicts if verdict is not None]
    return any(known) if known else None
