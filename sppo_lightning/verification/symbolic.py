"""Whether two expressions are equal, by math-verify's parser and sympy's arithmetic. Runs in workers only.

Two expressions are equal where their values agree to 200 places at several points that nobody would choose, which
is stricter than comparing decimals and cheaper than simplifying. What has no values, such as relations, goes to
math-verify.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sppo_lightning.verification.notation import to_latex

_DIGITS = 1000  # that a difference may take to be told from 0
_NEARLY = 1e-20  # relative difference of the factors of one equation
_ZERO = 1e-200  # nearer than any two unequal numbers of an answer's length
# odd points of both signs, near and far, none of which anybody would write into an answer
_POINTS = ((731, 877), (-1193, 541), (91823, 617), (-389, 953), (-77711, 503))


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
            super().__init__(config=latex2sympy2.ConversionConfig(lowercase_symbols=False))

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
    differences = _values(difference, symbols)
    if differences is None:
        return None
    if all(abs(value) <= _ZERO for value in differences):
        return True
    return bool(not symbols and tolerance and abs(differences[0]) <= tolerance * abs(right.evalf()))


def _equal_equations(left: Any, right: Any) -> bool:
    """Whether an equation of several unknowns is another one with its terms moved, or both sides multiplied."""
    left, right = (_closed(each.lhs - each.rhs) for each in (left, right))
    symbols = left.free_symbols | right.free_symbols
    values = [_values(each, symbols) for each in (left, right)]
    if values[0] is None or values[1] is None or len(left.free_symbols) < 2 or 0 in values[1]:
        return False
    factors = [a / b for a, b in zip(values[0], values[1], strict=True)]
    return factors[0] != 0 and all(abs(factor / factors[0] - 1) <= _NEARLY for factor in factors)


def _values(expression: Any, symbols: set[Any]) -> list[Any] | None:
    """Values at every point, at one point where there are no unknowns; `None` where there is none."""
    import sympy

    found = []
    for over, under in _POINTS if symbols else _POINTS[:1]:
        point = {
            symbol: sympy.Rational(over * (2 * i + 1), under + 2 * i)
            for i, symbol in enumerate(sorted(symbols, key=str))
        }
        value = expression.evalf(30, subs=point, maxn=_DIGITS)
        if not all(part.is_Number and part.is_finite for part in value.as_real_imag()):
            return None
        found.append(value)
    return found


def _closed(expression: Any) -> Any:
    """An expression with its sums and integrals carried out, i as the imaginary unit, and f(x) as an unknown."""
    import sympy
    from sympy.core.function import AppliedUndef

    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        expression = expression.doit()
    names = {each: sympy.Symbol(str(each)) for each in expression.atoms(AppliedUndef)}
    expression = expression.xreplace(names)
    units = {each: sympy.I for each in expression.free_symbols if str(each) == "i"}
    return expression.subs(units) if units else expression


def _equal_objects(left: Any, right: Any) -> bool:
    """What math-verify says of things without values; of an expression and something else, that they differ."""
    import sympy
    from math_verify import verify

    if isinstance(left, sympy.Expr) != isinstance(right, sympy.Expr):
        return False
    return bool(verify([right], [left], timeout_seconds=None))
