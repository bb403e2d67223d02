"""Exact arithmetic on expressions that a model wrote: an allow-listed tree, bounded in every direction.

Nothing here raises on any input, and nothing takes more than linear time: what is too deep, too long or too large
is not read, or has no value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

MAX_TOKENS = 128  # of an expression
MAX_DEPTH = 32  # of its parentheses, signs and exponents
MAX_DIGITS = 40  # of a number as it is written
MAX_BITS = 512  # of a numerator or denominator on the way
MAX_FACTORIAL = 50

PERCENT = Fraction(1, 100)


class Token(NamedTuple):
    """A piece of a text."""

    kind: str  # "number", "frac", one of + - * / ^ ! % ( ), or what is no part of an expression
    text: str
    glued: bool  # whether no white space stands before it


@dataclass(frozen=True)
class Expression:
    """A node of the tree: a number, or an operation on one or two others."""

    operation: str  # "number", "negative", or one of + - * / ^ ! %
    parts: tuple[Expression, ...] = ()
    value: Fraction = Fraction(0)  # of a number
    unit: Fraction = Fraction(1)  # of a number: what its last written digit that is not a trailing zero counts

    @property
    def has_operator(self) -> bool:
        """Whether anything is computed; a sign or a percent sign alone computes nothing."""
        return self.operation in "+-*/^!" or any(part.has_operator for part in self.parts)

    @property
    def has_percent(self) -> bool:
        """Whether there is a percent sign in it."""
        return self.operation == "%" or any(part.has_percent for part in self.parts)

    @property
    def canonical(self) -> str:
        """The same text for what differs in spelling, parentheses and the order of terms or factors only."""
        if self.operation == "number":
            return str(self.value)
        parts = [part.canonical for part in self._flat()]
        return f"{self.operation}({','.join(sorted(parts) if self.operation in '+*' else parts)})"

    def _flat(self) -> list[Expression]:
        """The parts, of a sum of sums or a product of products those of all of them."""
        if self.operation not in "+*":
            return list(self.parts)
        return [
            each for part in self.parts for each in (part._flat() if part.operation == self.operation else [part])
        ]


class _Unreadable(Exception):
    """No expression that is understood, or one without a value within the bounds."""


def parse(tokens: Sequence[Token]) -> Expression | None:
    """The expression that the tokens spell from the first to the last, or `None` where they spell none.

    Usual precedence; powers bind to the right; a number or `)` directly before `(` multiplies, except after a
    division, where readers differ.
    """
    if not 0 < len(tokens) <= MAX_TOKENS:
        return None
    parser = _Parser(tokens)
    try:
        expression = parser.sum(0)
        return expression if parser.at == len(tokens) else None
    except _Unreadable:
        return None


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def next_is(self, *kinds: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].kind in kinds

    def take(self, *kinds: str) -> Token:
        if not self.next_is(*kinds):
            raise _Unreadable
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise _Unreadable
        left = self.product(depth)
        while self.next_is("+", "-"):
            left = Expression(self.take("+", "-").kind, (left, self.product(depth)))
        return left

    def product(self, depth: int) -> Expression:
        left, operation = self.signed(depth), "*"
        while self.next_is("*", "/", "("):
            if not self.next_is("("):
                operation = self.take("*", "/").kind
            elif operation == "/" or not self.tokens[self.at].glued:
                raise _Unreadable
            left = Expression(operation, (left, self.signed(depth)))
        return left

    def signed(self, depth: int) -> Expression:
        if not self.next_is("-"):
            return self.power(depth)
        self.take("-")
        if depth >= MAX_DEPTH:
            raise _Unreadable
        return Expression("negative", (self.signed(depth + 1),))

    def power(self, depth: int) -> Expression:
        base = self.atom(depth)
        while self.next_is("!", "%"):
            base = Expression(self.take("!", "%").kind, (base,))
        if not self.next_is("^"):
            return base
        self.take("^")
        if depth >= MAX_DEPTH:
            raise _Unreadable
        return Expression("^", (base, self.signed(depth + 1)))

    def atom(self, depth: int) -> Expression:
        if self.next_is("number"):
            return number(self.take("number").text)
        if self.next_is("frac"):
            self.take("frac")
            return Expression("/", (self.group(depth), self.group(depth)))
        return self.group(depth)

    def group(self, depth: int) -> Expression:
        self.take("(")
        inner = self.sum(depth + 1)
        self.take(")")
        return inner


def number(text: str) -> Expression:
    """A number of ASCII digits, with commas between thousands and a decimal point; at most `MAX_DIGITS` long."""
    whole, point, decimals = text.replace(",", "").partition(".")
    value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    zeros = 0 if point or not value else len(whole) - len(whole.rstrip("0"))
    return Expression("number", value=value, unit=Fraction(10**zeros, 10 ** len(decimals)))


def evaluate(expression: Expression, percent: Fraction = PERCENT) -> Fraction | None:
    """The exact value, or `None` where there is none, none that is rational, or none within the bounds.

    Args:
        expression: As `parse` returns it.
        percent: What a percent sign multiplies by.
    """
    try:
        return _value(expression, percent)
    except (_Unreadable, ZeroDivisionError):
        return None


def _value(expression: Expression, percent: Fraction) -> Fraction:
    if expression.operation == "number":
        return expression.value
    parts = [_value(part, percent) for part in expression.parts]
    value = _computed(expression.operation, parts[0], parts[-1], percent)
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise _Unreadable
    return value


def _computed(operation: str, left: Fraction, right: Fraction, percent: Fraction) -> Fraction:
    match operation:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left / right
        case "^":
            return _power(left, right)
        case "negative":
            return -left
        case "%":
            return left * percent
    if left.denominator != 1 or not 0 <= left <= MAX_FACTORIAL:
        raise _Unreadable
    return Fraction(math.factorial(left.numerator))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(abs(base.numerator), base.denominator).bit_length()
    # 0 to the 0 is left open, and roots are rarely rational
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS or base == exponent == 0:
        raise _Unreadable
    return base**exponent.numerator


def rounds_to(value: Fraction, written: Expression, percent: Fraction = PERCENT) -> bool | None:
    """Whether `value` rounds to the number `written`, at the place of its last digit; `None` if it is no number.

    A half may go either way, and the trailing zeros of a whole number may be of the rounding: 1234 is about 1230,
    1200 and 1000.
    """
    sign, scale = 1, Fraction(1)
    while written.operation in ("negative", "%"):
        sign, scale = (-sign, scale) if written.operation == "negative" else (sign, scale * percent)
        written = written.parts[0]
    if written.operation != "number":
        return None
    return abs(value - sign * scale * written.value) <= scale * written.unit / 2
