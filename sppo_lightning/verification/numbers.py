"""Numbers as they are written out, exactly, and the units and bases that stand beside them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:[ ][0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)(?:
      (?P<whole>{_INTEGER})?\\frac\{{(?P<over>[+-]?{_DECIMAL})\}}\{{(?P<under>[+-]?{_DECIMAL})\}}
    | (?:(?P<whole_before>{_INTEGER})[ ])?(?P<left>{_DECIMAL})/(?P<right>{_DECIMAL})
    | (?P<decimal>{_DECIMAL})(?:
        ×10\^(?:\{{(?P<power>[+-]?[0-9]{{1,3}})\}}|(?P<digit>[0-9])) | [eE](?P<e>[+-]?[0-9]{{1,3}})
      )?
    | (?P<start>{_INTEGER}?\.[0-9]*)(?:\\(?:overline|bar|dot)\{{(?P<repeated>[0-9]+)\}}|\((?P<again>[0-9]+)\))
    )(?P<percent>%|\\text\{{\s?percent\}}|[ ]?percent|)""",
    re.VERBOSE,
)
_MAX_NUMBER_CHARS = 120


def exact_number(text: str) -> Fraction | None:
    r"""The number that canonical text writes out, exactly, or `None` where it is not plainly a number.

    Integers, decimals, thousands separators, `\frac{a}{b}`, `a/b`, mixed numbers, `a×10^n`, `1e-7`, percent and
    repeating decimals (`0.\overline{3}`, `0.1(6)`).
    """
    match = _NUMBER.fullmatch(text) if len(text) <= _MAX_NUMBER_CHARS else None
    if match is None:
        return None
    part = {name: value.replace(",", "").replace(" ", "") for name, value in match.groupdict().items() if value}
    if "decimal" in part:
        power = part.get("power") or part.get("digit") or part.get("e") or 0
        value = Fraction(part["decimal"]) * Fraction(10) ** int(power)
    elif "start" in part:
        value = _repeating(part["start"], part.get("repeated") or part["again"])
    else:
        under = Fraction(part.get("under") or part["right"])
        whole = part.get("whole") or part.get("whole_before")
        over = part.get("over") or part["left"]
        if under == 0 or (whole and over[0] in "+-"):
            return None
        value = Fraction(whole or 0) + Fraction(over) / under
    value = value / 100 if "percent" in part else value
    return -value if part.get("sign") == "-" else value


def _repeating(start: str, repeated: str) -> Fraction:
    """What `0.1` and `6` stand for: 0.1666…."""
    places = len(start.partition(".")[2])
    first = Fraction(start) if start.strip(".") else Fraction(0)
    return first + Fraction(int(repeated), 10**places * (10 ** len(repeated) - 1))


class Quantity(NamedTuple):
    """Canonical text, and the unit behind or before it."""

    body: str
    unit: str | None


_UNIT_NAMES = """
mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre | in inch inche
ft foot feet | yd yard | mi mile | mg milligram | g gram | kg kilogram | lb pound | oz ounce | s sec second
min minute | h hr hour | day | week | wk | month | year yr | degree deg | radian rad | $ dollar usd | cent
l liter litre | ml milliliter millilitre | gal gallon | quart qt | pint pt | n newton | j joule | w watt | hz hertz
v volt | ohm | pa pascal | mol mole | mph | kph | unit | % | € euro | £
"""
_UNITS = {name: group.split()[0] for group in re.split(r"[|\n]", _UNIT_NAMES) for name in group.split()}
_COMPOUND = {"mph": "mi/h", "kph": "km/h"}
_NO_UNIT = re.compile(
    r"""\b(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundred\w*
    |thousand\w*|million\w*|billion\w*|trillion\w*|dozens?|pairs?|score|gross|percent\w*|times|plus|minus|over|of|or
    |and|more|less|least|most|than|not|no|approximately|approx|about|around|roughly|nearly|almost|if|when|where|for
    |otherwise|mod|base|to|pi|factorial|root|point|is|remainder|true|false|odd|even)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_END = r"(?:\^\{?[0-9]\}?)?"
_BEHIND = re.compile(
    rf"""(?P<body>.*?[0-9A-Za-z)}}\]°%])[ ]?(?P<unit>
      (?:[×/]?\\text\{{[^{{}}]*[A-Za-z][^{{}}]*\}}{_END})+
    | (?<=[0-9)}}])(?:[ ][A-Za-z]|[A-Za-z]{{2,}})(?:[A-Za-z/ ]*[A-Za-z])?{_END}
    | °(?:[CF]|\\text\{{[CF]\}})?
    | [$€£]
    )""",
    re.VERBOSE | re.DOTALL,
)
_POWER = re.compile(r"\^\{?([0-9])\}?")
_SQUARE = (("square", "2"), ("sq", "2"), ("squared", "2"), ("cubic", "3"), ("cubed", "3"), ("cu", "3"))


def quantity(text: str) -> Quantity:
    r"""Canonical text apart from the unit it names: `5\text{cm}^2`, `$36`, `30 degrees`, `60\text{km/h}`.

    Words of any kind in `\text{…}` are a unit ("5 apples"), and bare words if they are known ones; words that
    change the number ("million", "or more") are not, and stay where they are.
    """
    text = text.replace(r"\text{$}", "$")
    if "°" in text[:-1] and not re.search(r"°\\?[CFt]|\\[a-z]", text):
        return Quantity(text.replace("°", ""), "degree")  # 180°/2
    if text[:1] in "$€£" and len(text) > 1:
        return Quantity(text[1:], unit_name(text[0]))
    if text[:2] in ("-$", "-€", "-£"):
        return Quantity("-" + text[2:], unit_name(text[1]))
    match = _BEHIND.fullmatch(text)
    if match is None:
        return Quantity(text, None)
    said = match["unit"].replace(r"\text", "").replace("{", "").replace("}", "").strip()
    name = unit_name(said)
    is_bare = "\\text" not in match["unit"] and not said.startswith(("°", "$", "€", "£"))
    is_noun = said.isalpha() and len(said) > 3 and exact_number(match["body"]) is not None  # 5 apples
    if said.startswith("°") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return Quantity(text, None)
    if _NO_UNIT.search(said) or (is_bare and not is_noun and not _is_known(name)):
        return Quantity(text, None)
    return Quantity(match["body"], name)


def unit_name(said: str) -> str:
    """One name for a unit however it is written: "square centimeters" and "cm^2" are both `cm2`."""
    said = said.lower().replace("°c", "celsius").replace("°f", "fahrenheit").replace("°", "degree").strip(" .")
    parts = []
    for part in re.split(r"/|\bper\b", said):
        power = "".join(_POWER.findall(part))
        words = re.findall(r"[a-z$€£%]+", _POWER.sub("", part))
        for word, exponent in _SQUARE:
            if word in words and len(words) > 1:
                words.remove(word)
                power = exponent
        parts.append(" ".join(map(_singular, words)) + ("" if power == "1" else power))
    name = "/".join(parts)
    return _COMPOUND.get(name, name)


def _singular(word: str) -> str:
    forms = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next(
        (_UNITS[form] for form in forms if form in _UNITS), word.removesuffix("s") if len(word) > 3 else word
    )


def _is_known(name: str) -> bool:
    known = set(_UNITS.values()) | {"mi", "celsius", "fahrenheit"}
    return all(part.rstrip("0123456789") in known for part in name.split("/"))


_BASED = re.compile(
    r"\(?(?:\\text\{([0-9A-F]+)\}|\{?([0-9A-F]+)\}?)\)?_(?:([0-9])|\{\(?([0-9]{1,2})\)?\}|\{?\\text\{([a-z]+)\}\}?)"
)
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


def based_number(text: str) -> tuple[str, int] | None:
    """Digits without leading zeros and base of canonical text such as `1011_2`, or `None`."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    marked, plain, digit, digits, word = match.groups()
    base = int(digit or digits) if digit or digits else _BASE_WORDS.get(word, 0)
    return ((marked or plain).lstrip("0") or "0", base)
