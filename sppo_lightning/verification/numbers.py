"""Numbers as they are written out, exactly, and the units and bases that stand beside them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?:[ ][0-9]{3})+|[0-9]+)"
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
v volt | ohm | pa pascal | mol mole | mph | kph | unit | € euro | £ | ¥ yen | ₹ rupee | kelvin | people person
children child | men man | women woman | way | kj | kw | kpa | acre | ha hectare | celsius | fahrenheit
"""
_UNITS = {name: group.split()[0] for group in re.split(r"[|\n]", _UNIT_NAMES) for name in group.split()}
_COMPOUND = {"mph": "mi/h", "kph": "km/h"}
# what changes the number that it stands behind, or says that it is none
_NO_UNIT = re.compile(
    r"""\b(?:hal(?:f|ves|ved)|thirds?|quarters?|fourths?|\w+[^o]ths?|fifths?|tens|dozens?|pairs?|score|gross|(?-i:[MKkB])|bn
    |mil|(?:hundr|thous|milli|billi|trilli)\w+|per\s?cents?|percent\w*|pct|times|plus|minus|over|of|or|and|more|less|least|most
    |than|not|no|never|nor|approx\w*|about|around|roughly|nearly|almost|perhaps|maybe|possibly|if|when|where|for|but
    |otherwise|mod\w*|base|to|pi|e|factorial|root|point|is|was|as|this|thus|versus|vs|\w+wards?|fails?|unless|always
    |remainder|true|false|odd|even|powers?|logs?|sin|cos|tan|exclusive)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_PLURAL = re.compile(r"(?:[A-Za-z-]+ )*[A-Za-z]{3,}s(?: (?:old|long|tall|wide|high|deep|each|total|altogether))?")
_END = r"(?:\^\{?-?[0-9]\}?)?"
_BEHIND = re.compile(
    rf"""(?P<body>.*?[0-9A-Za-z)}}\]°%])[ ]?(?P<unit>
      (?:[×/]?\\text\{{(?:[^{{}}]|\^\{{-?[0-9]\}})*\}}{_END})+
    | (?<=[0-9)}}])(?:[ ][A-Za-z]|[A-Za-z]{{2,}})(?:[A-Za-z/ ]*[A-Za-z])?{_END}
    | °(?:[CF]|\\text\{{[CF]\}})?
    | [$€£¥₹]
    )""",
    re.VERBOSE | re.DOTALL,
)
_POWER = re.compile(r"\^\{?(-?[0-9])\}?")
_SQUARE = (("square", "2"), ("sq", "2"), ("squared", "2"), ("cubic", "3"), ("cubed", "3"), ("cu", "3"))


def quantity(text: str, gold_unit: str | None = None) -> Quantity:
    r"""Canonical text apart from the unit it names: `5\text{cm}^2`, `$36`, `30 degrees`, `60\text{km/h}`.

    A unit is a known one, what is counted (a plural: `5 apples`), or what the gold answer names (`gold_unit`, "any"
    for the gold answer itself). Words that change the number ("million", "or more") are none.
    """
    text = text.replace(r"\text{$}", "$")
    if "°" in text[:-1] and not re.search(r"°[^-+×/)]|\\[a-z]", text):
        return Quantity(text.replace("°", ""), "degree")  # 180°/2
    sign = text[:1] if text[:1] == "-" else ""
    if text[len(sign) : len(sign) + 1] in tuple("$€£¥₹") and len(text) > len(sign) + 1:
        return Quantity(sign + text[len(sign) + 1 :], unit_name(text[len(sign)]))
    match = _BEHIND.fullmatch(text)
    if match is None:
        return Quantity(text, None)
    said = match["unit"].replace(r"\text", "").replace("{", "").replace("}", "").strip()
    name = unit_name(said)
    if said.startswith("°") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return Quantity(text, None)
    is_text = "\\text" in match["unit"] or not said[0].isalpha()
    counted = _PLURAL.fullmatch(said) is not None and exact_number(match["body"]) is not None
    named = is_text and (gold_unit in ("any", name))
    if (
        re.search("[0-9]", _POWER.sub("", said))
        or _NO_UNIT.search(said)
        or not (named or counted or _is_known(name))
    ):
        return Quantity(text, None)
    return Quantity(match["body"], name)


def unit_name(said: str) -> str:
    """One name for a unit however it is written: "square centimeters" and "cm^2" are both `cm2`."""
    said = re.sub(r"\b(?!M[gmWPH])[A-Z][A-Za-z]*", lambda word: word.group().lower(), said)  # a Mm is no mm
    said = said.replace("°c", "celsius").replace("°f", "fahrenheit").replace("°", "degree").strip(" .")
    parts = []
    for part in re.split(r"/|\bper\b", said):
        power = "".join(_POWER.findall(part))
        words = re.findall(r"[A-Za-z$€£¥₹]+", _POWER.sub("", part))
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


_KNOWN_UNITS = frozenset(_UNITS.values())


def _is_known(name: str) -> bool:
    return all(part.rstrip("0123456789") in _KNOWN_UNITS for part in name.split("/"))


_BASED = re.compile(
    r"(-?)\(?(?:\\text\{([0-9A-F]+)\}|\{?([0-9A-F]+)\}?)\)?_(?:([0-9])|\{\(?([0-9]{1,2})\)?\}|\{?\\text\{([a-z]+)\}\}?)"
)
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


def based_number(text: str) -> tuple[str, int] | None:
    """Digits without leading zeros and base of canonical text such as `1011_2`, or `None`."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    sign, marked, plain, digit, digits, word = match.groups()
    base = int(digit or digits) if digit or digits else _BASE_WORDS.get(word)
    return None if base is None else (sign + ((marked or plain).lstrip("0") or "0"), base)
