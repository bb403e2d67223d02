"""What of an asserted expression can be computed outside the sandbox, on values that came from inside."""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MAX_SIZE = 100_000  # bits or entries of what arithmetic takes and gives


class Inside(Exception):
    """Raised for what cannot be computed outside."""


COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    # one side is a constant here, and small numbers and texts are one object each inside
    ast.Is: lambda a, b: a is b or (type(a) is type(b) and type(a) in (int, str) and a == b),
    ast.IsNot: lambda a, b: not (a is b or (type(a) is type(b) and type(a) in (int, str) and a == b)),
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, tuple, dict, frozenset)},
    "set": frozenset,  # as which sets come out
}
CONSTANTS = {f"math.{name}": getattr(math, name) for name in ("pi", "e", "inf", "nan", "tau")} | {
    "sys.maxsize": sys.maxsize
}
CHECKS: dict[str, Callable[..., Any]] = {  # of values from inside
    **{name: getattr(math, name.removeprefix("math.")) for name in ("math.isclose", "math.fabs", "math.isnan")},
    **{"isclose": math.isclose, "fabs": math.fabs, "abs": abs, "round": round, "bool": bool, "type": type},
    **{"isinstance": isinstance, "all": all, "any": any},
}
BUILDERS: dict[str, Callable[..., Any]] = {  # of constants alone: of anything else, inside
    **{kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, str, int, float, complex, bytes)},
    **{f.__name__: f for f in (sorted, len, sum, min, max, zip, enumerate, reversed, chr, ord)},
    **{"range": range, "Fraction": Fraction, "Decimal": Decimal, "Counter": Counter},
    **{"fractions.Fraction": Fraction, "decimal.Decimal": Decimal, "collections.Counter": Counter},
    **{
        f"math.{name}": getattr(math, name) for name in ("sqrt", "sin", "cos", "tan", "exp", "log", "floor", "ceil")
    },
}
TEXT_METHODS = frozenset({"split", "upper", "lower", "join", "strip", "replace", "title"})


def size_of(value: Any) -> int:
    """Bits of a number, entries of anything else."""
    if isinstance(value, Fraction):
        return size_of(value.numerator) + size_of(value.denominator)
    return value.bit_length() if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 64


def arithmetic(op: type[ast.operator], a: Any, b: Any, trusted: bool) -> Any:
    """Arithmetic that cannot hold the trainer up; raises `OverflowError`."""
    numbers = isinstance(a, int | float | complex | Fraction | Decimal)
    size = size_of(a) + size_of(b)
    if op is ast.Mult and isinstance(a, int) != isinstance(b, int):  # a sequence, repeated
        size = max(size, size_of(a) * abs(b) if isinstance(b, int) and not numbers else 0)
        size = max(size, size_of(b) * abs(a) if isinstance(a, int) and hasattr(b, "__len__") else 0)
    if op is ast.Pow and isinstance(b, int):
        size = max(size, size_of(a) * abs(b) if not isinstance(a, float | complex) else 0)
    if size > _MAX_SIZE or (op is ast.Mod and not numbers and not trusted):
        raise OverflowError("too large to be computed outside the sandbox")
    return BINARY[op](a, b)


def mutable(value: Any) -> bool:
    """Whether a call could change the value."""
    if isinstance(value, tuple | frozenset):
        return any(map(mutable, value))
    return isinstance(value, list | dict | set)


def literal(value: Any) -> ast.expr:
    """The value as source; raises `Inside` for one that has none."""
    try:
        node = ast.parse(repr(value), mode="eval").body
        if repr(ast.literal_eval(node)) == repr(value):
            return node
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise Inside
