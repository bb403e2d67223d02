r"""Answers in text: where they stand, and what can be decided about them exactly and at once.

Linear time, the standard library alone, and nothing here evaluates what a model wrote: `compare` gives a
final verdict or `None`, and only what it leaves open and `is_refused` lets through goes to a computer algebra
system.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_ANSWER_CHARS = 512

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(r"(?:\banswer[*_ ]{0,4}:|\bfinal answer is:?)([^\n]*)", re.IGNORECASE)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` or `\fbox{…}`; `None` without one or where it is never closed."""
    starts = [at for at in (text.find(r"\boxed"), text.find(r"\fbox")) if at >= 0]
    if not starts:
        return None
    open_braces: list[int] = []  # where the content of an open box starts, -1 for any other open brace
    last_opened = -1
    closed: tuple[int, int] | None = None
    last_is_closed = False
    for token in _BRACES.finditer(text, min(starts)):
        symbol = token.group()
        if symbol == "{":
            open_braces.append(-1)
        elif symbol == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                closed = (start, token.start())
                last_is_closed = last_is_closed or start == last_opened
        elif symbol[-1] == "{" and len(symbol) > 2:
            open_braces.append(token.end())
            last_opened, last_is_closed = token.end(), False
    return text[slice(*closed)] if closed and last_is_closed else None


def extract_answer(response: str) -> str | None:
    r"""The final answer of a response, or `None` where it gives none.

    Only the text after the last `</think>` counts: its last `\boxed{…}`, without any box the rest of the line
    after the last `####`, without that the rest of the last line with "Answer:" or "final answer is". An
    answer that is empty or longer than 512 characters is none.
    """
    text = response.rpartition("</think>")[2]
    answer: str | None
    if r"\boxed" in text or r"\fbox" in text:
        answer = extract_boxed(text)
    elif (at := text.rfind("####")) >= 0:
        answer = text[at + 4 :].split("\n", 1)[0]
    else:
        answer = None
        for match in _ANSWER_LINE.finditer(text):
            answer = match.group(1).strip().strip("*_").rstrip(".")
    answer = answer.strip() if answer else None
    return answer if answer and len(answer) <= MAX_ANSWER_CHARS else None


_DELIMITERS = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_UNSEEN = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])")
_SPACE = re.compile(r"\\[,!;: ]|~|\\q?quad(?![A-Za-z])")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9A-Za-z])\s*(\{[^{}]*\}|[0-9A-Za-z])")
_SQRT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_SINGLE = re.compile(r"([_^])\s*\{\s*(\w)\s*\}")
_INNER_SPACE = re.compile(r"(?<=\w)\s+(?=\w)")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ"}
)


def normalize(answer: str) -> str:
    """The answer without what does not change its meaning: spacing, delimiters, how a fraction is written."""
    text = answer.strip().rstrip(".").translate(_SYMBOLS)
    if match := _DELIMITERS.fullmatch(text):
        text = next(group for group in match.groups() if group is not None)
    text = _SPACE.sub(" ", _UNSEEN.sub("", text)).replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    text = _FRACTION.sub(lambda m: rf"\frac{{{m[1].strip('{}')}}}{{{m[2].strip('{}')}}}", text)
    text = _SINGLE.sub(r"\1\2", _SQRT.sub(r"\\sqrt{\1}", text)).strip()
    if match := _TEXT.fullmatch(text):
        text = match[1].strip().rstrip(".")
    # A space between two digits or letters stays: "1 2" is not 12.
    return re.sub(r"\s+", "", _INNER_SPACE.sub("\0", text)).replace("\0", " ")


_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)(?:
      (?P<whole>{_INTEGER})?\\frac\{{(?P<over>[+-]?{_DECIMAL})\}}\{{(?P<under>[+-]?{_DECIMAL})\}}
    | (?:(?P<whole_before>{_INTEGER})[ ])?(?P<left>{_DECIMAL})/(?P<right>{_DECIMAL})
    | (?P<decimal>{_DECIMAL})(?:
        (?:\\times|\\cdot|\*)10\^\{{?(?P<power>[+-]?[0-9]{{1,3}})\}}? | [eE](?P<e>[+-]?[0-9]{{1,3}})
      )?
    )(?P<percent>%?)""",
    re.VERBOSE,
)
_MAX_NUMBER_CHARS = 120


def exact_number(text: str) -> Fraction | None:
    r"""The number that a normalised answer writes out, exactly, or `None` where it is not plainly a number.

    Integers, decimals, thousands commas, `\frac{a}{b}`, `a/b`, mixed numbers, `a\times10^n`, `1e-7`, percent.
    """
    match = _NUMBER.fullmatch(text) if len(text) <= _MAX_NUMBER_CHARS else None
    if match is None:
        return None
    part = {name: value.replace(",", "") for name, value in match.groupdict().items() if value}
    if "decimal" in part:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part.get("power") or part.get("e") or 0)
    else:
        under = Fraction(part.get("under") or part["right"])
        whole = part.get("whole") or part.get("whole_before")
        over = part.get("over") or part["left"]
        if under == 0 or (whole and over[0] in "+-"):
            return None
        value = Fraction(whole or 0) + Fraction(over) / under
    value = value / 100 if "percent" in part else value
    return -value if part.get("sign") == "-" else value


class Quantity(NamedTuple):
    """A number, and its unit where it names one."""

    value: Fraction
    unit: str | None


_UNIT_NAMES = """
mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre | in inch
ft foot feet | yd yard | mi mile | g gram | kg kilogram | lb pound | s sec second | min minute | h hr hour
day | week | month | year | degree | radian rad | dollar | cent | mph | unit
"""
_UNITS = {name: group.split()[0] for group in re.split(r"[|\n]", _UNIT_NAMES) for name in group.split()}
_FACTORS = re.compile(r"\b(?:percent|hundred|thousand|million|billion|trillion|dozen|pair)s?\b", re.IGNORECASE)
_UNIT = re.compile(
    r"""(?P<value>[^ ]+?(?:[ ][0-9./]+)?)(?:
      \\(?:text|textrm|mathrm|mbox)\{(?P<text>[A-Za-z. ]+)\}
    | [ ](?P<bare>[A-Za-z]{2,})
    | (?P<degree>\^\{?\\circ\}?)
    )(?:\^\{?(?P<power>[23])\}?)?""",
    re.VERBOSE,
)


def _unit_name(word: str) -> str:
    word = word.lower().strip(" .")
    singular = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((_UNITS[form] for form in singular if form in _UNITS), word)


def quantity(text: str) -> Quantity | None:
    r"""The number and unit that a normalised answer writes out (`5\text{cm}^2`, `$36`), or `None`."""
    unit: str | None = None
    if text.startswith(("$", "-$")):
        text, unit = text.replace("$", "", 1), "dollar"
    elif match := _UNIT.fullmatch(text):
        word = match["text"] or match["bare"] or "degree"
        unit = _unit_name(word)
        if _FACTORS.search(word) or (match["bare"] and unit not in _UNITS.values()):
            return None
        unit, text = unit + (match["power"] or ""), match["value"]
    value = exact_number(text)
    return None if value is None else Quantity(value, unit)


_OPTION = re.compile(r"\(?([A-Z])[).:]{0,2}")
_BASED = re.compile(r"[0-9A-F]+_(?:[0-9]|\{[0-9]{2}\})")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?")


def compare(answer: str, gold: str) -> bool | None:
    """Whether the answer is the gold answer where that can be said exactly and at once, else `None`.

    Final for equal text, number against number (units included, optional when one side has none), options,
    words and numbers in a named base.
    """
    left, right = normalize(answer), normalize(gold)
    if left == right:
        return True
    if _BASED.fullmatch(left) or _BASED.fullmatch(right):
        return False
    left_option, right_option = _OPTION.fullmatch(left), _OPTION.fullmatch(right)
    if left_option and right_option:
        return left_option[1] == right_option[1]
    if _WORDS.fullmatch(right):  # a computer algebra system would read "east" as e·a·s·t, which equals "seat"
        return left.casefold() == right.casefold()
    given, wanted = quantity(left), quantity(right)
    if given and wanted:
        units = {unit for unit in (given.unit, wanted.unit) if unit}
        return given.value == wanted.value and len(units) < 2
    if "=" in right and "=" not in left:  # the gold answer x=5 is met by 5
        name, _, value = right.partition("=")
        return compare(left, value) if value and "=" not in value and _VARIABLE.fullmatch(name) else None
    return None


def sides(answer: str, gold: str) -> list[str]:
    """What has to equal the gold answer: the sides of an `=` chain but a leading variable, or the whole.

    `x=5` claims 5; `41=42` claims both, so it is neither.
    """
    text = normalize(answer)
    if (
        "=" not in text
        or "=" in gold
        or re.search(r"[<>,;!:]|\\(?:n?[lg]?e|[lg]eq|neq?|in|begin)(?![A-Za-z])", text)
    ):
        return [answer]
    first, *rest = text.split("=")
    claims = rest if _VARIABLE.fullmatch(first) else [first, *rest]
    return claims if all(claims) else [answer]


_COSTLY = re.compile(
    r"[0-9]{100}"  # huge numbers
    r"|\^\{?[+-]?[0-9]{6}|\*\*"  # huge exponents; Python's power is no LaTeX
    r"|\^[\s{(]*[0-9]+[\s})]*\^"  # towers of numbers
    r"|[0-9]{4}\s*!|!\s*!"  # huge and repeated factorials
    r"|__|[\"`@#]"  # code
)
_MAX_DEPTH = 16
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_COMMAND_NAMES = """
frac dfrac tfrac cfrac sqrt left right big Big bigg Bigg bigl bigr Bigl Bigr cdot times div pm mp text
textbf textrm mathrm mathbf mathbb mathcal mbox operatorname quad qquad displaystyle circ degree pi theta
alpha beta gamma delta epsilon varepsilon lambda mu sigma phi varphi omega rho tau zeta eta kappa nu xi chi
psi Omega Delta Gamma Lambda Sigma Phi Psi Theta infty in notin cup cap setminus subset subseteq emptyset
varnothing sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp le leq leqslant ge geq
geqslant lt gt ne neq land lor wedge vee begin end lfloor rfloor lceil rceil lvert rvert vert langle rangle
binom dbinom tbinom overline bar vec hat ldots dots cdots to mid colon equiv pmod bmod gcd max min det sum
prod int lim limits angle triangle prime
"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())


def is_refused(answer: str, gold: str) -> bool:
    """Whether a computer algebra system must not see an answer: costly, approximate or no mathematics."""
    if len(answer) > MAX_ANSWER_CHARS or _depth(answer) > _MAX_DEPTH or _COSTLY.search(answer):
        return True
    if re.search(r"\)\s*!|\\operatorname\s*\{", answer) and not re.search(r"!|\\operatorname", gold):
        return True
    if set(_FACTORS.findall(answer.lower())) != set(_FACTORS.findall(gold.lower())):
        return True  # a unit may be left out, a factor may not
    known = _COMMANDS.union(_COMMAND.findall(gold))
    return "≈" in answer or any(command not in known for command in _COMMAND.findall(answer))


def _depth(text: str) -> int:
    """The deepest nesting of brackets; 0 where nothing nests."""
    depth = deepest = 0
    for symbol in text:
        if symbol in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif symbol in "])}":
            depth -= 1
    return deepest


def why_ill_formed(gold: str) -> str | None:
    """Why a gold answer cannot be compared with anything, or `None` where it can."""
    if not gold.strip():
        return "the gold answer is empty"
    if len(gold.strip()) > MAX_ANSWER_CHARS:
        return f"the gold answer is longer than {MAX_ANSWER_CHARS} characters"
    depth = 0
    for token in _BRACES.finditer(gold):
        if token.group()[-1] in "{}" and token.group() not in (r"\{", r"\}"):
            depth += 1 if token.group()[-1] == "{" else -1
            if depth < 0:
                break
    return None if depth == 0 else f"the braces of the gold answer {gold!r} do not match"
