"""Whether two expressions are equal, by math-verify's parser and sympy's arithmetic. Runs in workers only.

Two expressions are equal where a thousand digits do not tell their difference from 0, at several points that
nobody would choose: stricter than comparing decimals, cheaper than simplifying. What has no values, such as
relations, goes to math-verify.
"""

from __future__ import annotations

import hashlib
import random
from functools import cache
from typing import Any

from sppo_lightning.verification.notation import to_latex

_DIGITS = 1000  # that a difference may take to be told from 0
_NEARLY = 1e-20  # relative difference of the factors of one equation


class UnreadableGold(ValueError):
    """The gold answer is no mathematics that the parser knows."""


def equal(answer: str, gold: str, tolerance: float = 0.0) -> bool:
    """Whether canonical texts are equal expressions.

    Args:
        answer: What is claimed.
        gold: What it should equal.
        tolerance: Relative distance up to which two constants are equal; 0 for exactly.

    Raises:
        UnreadableGold: Where the gold answer cannot be parsed.
    """
    try:
        expected = _parse(gold)
    except RecursionError:
        raise
    except Exception as error:
        raise UnreadableGold(gold) from error
    claimed = _parse(answer)
    by_value = _equal_values(claimed, expected, tolerance)
    return _equal_objects(claimed, expected) if by_value is None else by_value


def _parse(canonical: str) -> Any:
    return _parser_class()().parse(to_latex(canonical))


@cache
def _parser_class() -> Any:
    """The parser of math-verify, which makes sympy objects of LaTeX, token by token."""
    import sympy
    from latex2sympy2_extended import latex2sympy2

    class Parser(latex2sympy2._Latex2Sympy):
        """Tells `X` from `x`, and reads digits itself: its base hands them to `sympify`, which evaluates Python."""

        def __init__(self) -> None:
            config = latex2sympy2.ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
            super().__init__(config=config)

        def parse_number(self, text: str) -> Any:
            return sympy.Integer(int(text))

    return Parser


def _equal_values(left: Any, right: Any, tolerance: float) -> bool | None:
    """Whether expressions, or equations, have equal values everywhere; `None` where they have none."""
    import sympy

    if isinstance(left, sympy.Eq) and isinstance(right, sympy.Eq):
        return _equal_equations(left, right)
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return None
    left, right = _closed(left), _closed(right)
    difference = left - right
    if difference.is_Rational and (difference == 0 or not tolerance):
        return bool(difference == 0)  # exact, however small it is
    symbols = left.free_symbols | right.free_symbols
    differences = [_value(difference, point) for point in _points(symbols, difference)]
    if None in differences:
        return None
    if not any(differences):
        return True
    return bool(not symbols and tolerance and abs(differences[0]) <= tolerance * abs(right.evalf()))


def _equal_equations(left: Any, right: Any) -> bool:
    """Whether an equation of several unknowns is another one with its terms moved, or both sides multiplied."""
    left, right = (_closed(each.lhs - each.rhs) for each in (left, right))
    symbols = left.free_symbols | right.free_symbols
    pairs = [[_value(each, point) for each in (left, right)] for point in _points(symbols, left - right)]
    if len(left.free_symbols) < 2 or not all(b for _, b in pairs) or any(a is None for a, _ in pairs):
        return False
    factors = [a / b for a, b in pairs]
    return factors[0] != 0 and all(abs(factor / factors[0] - 1) <= _NEARLY for factor in factors)


def _points(symbols: set[Any], expression: Any) -> list[dict[Any, Any]]:
    """Where to look: points of both signs that depend on the expression, so that none can be written for them.

    Far away too where an expression has pieces; at whole numbers where it has factorials.
    """
    import sympy

    if not symbols:
        return [{}]
    text = sympy.srepr(expression).encode()
    draw = random.Random(hashlib.blake2b(text).digest())
    if expression.has(sympy.factorial, sympy.binomial, sympy.factorial2):
        return [
            {symbol: sympy.Integer(draw.randint(5, 40)) for symbol in sorted(symbols, key=str)} for _ in range(4)
        ]
    has_pieces = expression.has(sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign) or any(
        power.exp.is_Rational and not power.exp.is_Integer for power in expression.atoms(sympy.Pow)
    )
    sizes = [1, 1, 100, 3, 100] + ([10**5, 10**9, 10**5, 10**9] if has_pieces else [])
    sizes += [sympy.Rational(1, 10), sympy.Rational(1, 9)] if has_pieces else []
    return [
        {
            symbol: sympy.Rational((-1) ** number * size * draw.randint(300, 2999), draw.randint(300, 999))
            for symbol in sorted(symbols, key=str)
        }
        for number, size in enumerate(sizes)
    ]


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point, exactly 0 where a thousand digits do not tell it from 0; `None` where there is none."""
    import sympy

    value = expression.evalf(30, subs=point, maxn=_DIGITS)
    parts = value.as_real_imag()
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    # sympy marks what it could not tell from 0 with the precision of one bit
    return value if any(part != 0 and part._prec > 1 for part in parts) else sympy.Integer(0)


def _closed(expression: Any) -> Any:
    """An expression with its sums and integrals carried out, i as the imaginary unit, and f(x) as an unknown."""
    import sympy
    from sympy.core.function import AppliedUndef

    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        expression = expression.doit()
    names = {each: sympy.Symbol(str(each)) for each in expression.atoms(AppliedUndef)}
    expression = expression.xreplace(names)
    expression = expression.replace(_is_odd_root, lambda power: -((-power.base) ** power.exp))
    units = {each: sympy.I for each in expression.free_symbols if str(each) == "i"}
    return expression.subs(units) if units else expression


def _is_odd_root(power: Any) -> bool:
    """Whether it is such as the cube root of -8, which is meant to be -2."""
    if not (power.is_Pow and power.exp.is_Rational and power.base.is_number and power.base.is_negative):
        return False
    return bool(power.exp.p == 1 and power.exp.q > 1 and power.exp.q % 2)


def _equal_objects(left: Any, right: Any) -> bool:
    """What math-verify says of things without values; of an expression and something else, that they differ."""
    import sympy
    from math_verify import verify

    if isinstance(left, sympy.Expr) != isinstance(right, sympy.Expr):
        return False
    return bool(verify([right], [left], timeout_seconds=None))
