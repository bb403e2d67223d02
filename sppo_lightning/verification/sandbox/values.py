"""Plain values as JSON that keeps their types; runs on both sides of the sandbox, on the standard library alone.

Only exact builtins pass, and a few exact types of the standard library: an instance of another subclass, whose
`__eq__` could say anything, does not.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict

TYPE_CHECKING = False  # `typing` would take milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

MAX_DEPTH, MAX_VALUES = 100, 200_000
MAX_FRACTION = 10_000  # hexadecimal digits, since the greatest common divisor of more takes long


class NotPlain(TypeError):
    """A value that is no plain data, or too much of it."""


def encode(value: Any) -> Any:
    """What JSON can hold of `value`; raises `NotPlain`."""
    count = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        kind = type(value)
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise NotPlain("a value nested too deeply or too large")
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**53) < value < 2**53 else {"int": hex(value)}
        if kind is float:
            return {"float": value.hex()}
        if kind is list or kind is tuple or kind is set or kind is frozenset:
            name = "set" if kind is frozenset else kind.__name__
            return {name: [walk(entry, depth + 1) for entry in value]}
        if kind is dict or kind is Counter or kind is defaultdict or kind is OrderedDict:
            return {"dict": [[walk(k, depth + 1), walk(v, depth + 1)] for k, v in dict.items(value)]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is complex:
            return {"complex": [value.real.hex(), value.imag.hex()]}
        if kind is _loaded("decimal", "Decimal"):
            return {"decimal": str(value)}
        if kind is _loaded("fractions", "Fraction"):
            return {"fraction": [hex(value.numerator), hex(value.denominator)]}
        raise NotPlain(f"a value of type {kind.__name__}")

    return walk(value, 0)


def _loaded(module: str, name: str) -> Any:
    """A class of a module that takes long to import, and that only values of it need."""
    return getattr(sys.modules.get(module), name, module)


def decode(found: Any, depth: int = 0) -> Any:
    """The value that was encoded; raises `NotPlain` for what `encode` never gives."""
    if depth > MAX_DEPTH + 1:
        raise NotPlain("a value nested too deeply")
    if found is None or isinstance(found, bool | int | str):
        return found
    if not isinstance(found, dict) or len(found) != 1:
        raise NotPlain("no encoded value")
    ((kind, content),) = found.items()
    try:
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float.fromhex(content)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "complex":
            return complex(*map(float.fromhex, content))
        if kind == "decimal":
            from decimal import Decimal  # takes long to import, and is seldom met

            return Decimal(content)
        if kind == "fraction" and max(map(len, content)) <= MAX_FRACTION:
            from fractions import Fraction

            return Fraction(*(int(part, 16) for part in content))
        if kind in ("list", "tuple"):
            entries = [decode(entry, depth + 1) for entry in content]
            return entries if kind == "list" else tuple(entries)
        if kind == "set":
            return frozenset(_spread([decode(entry, depth + 1) for entry in content]))
        if kind == "dict":
            keys = _spread([decode(k, depth + 1) for k, _ in content])
            return dict(zip(keys, (decode(v, depth + 1) for _, v in content), strict=True))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise NotPlain(f"no encoded {kind}") from error
    raise NotPlain("no encoded value")


def _spread(keys: list[Any]) -> list[Any]:
    """The keys, unless most share a hash: a set of multiples of 2**61 - 1 takes quadratic time to build."""
    if len({hash(key) for key in keys}) * 4 < len(keys):
        raise NotPlain("keys that collide")
    return keys
