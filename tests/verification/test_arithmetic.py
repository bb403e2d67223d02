import random
from fractions import Fraction

import pytest

from sppo_lightning.verification.arithmetic import MAX_DEPTH, MAX_TOKENS, Token, evaluate, number, parse, rounds_to


def tokens(text: str) -> list[Token]:
    """One token for each word, glued to the one before where a `~` stands in front of it."""
    words = [(word.removeprefix("~"), word.startswith("~")) for word in text.split()]
    return [Token(word if word in set("+-*/^!%()") | {"frac"} else "number", word, glued) for word, glued in words]


def value(text: str) -> Fraction | None:
    expression = parse(tokens(text))
    return None if expression is None else evaluate(expression)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 * 4 + 2", 14),
        ("2 + 3 * 4", 14),
        ("10 - 3 - 2", 5),
        ("12 / 3 / 2", 2),
        ("6 / 2 * 3", 9),
        ("2 ^ 3 ^ 2", 512),
        ("- 2 ^ 2", -4),
        ("( - 2 ) ^ 2", 4),
        ("2 ^ - 1", Fraction(1, 2)),
        ("5 - - 3", 8),
        ("2 ~( 3 + 4 )", 14),
        ("( 2 ) ~( 3 )", 6),
        ("1,200.50 / 2", Fraction(60025, 100)),
        (".5 * 4", 2),
        ("50 %", Fraction(1, 2)),
        ("5 !", 120),
        ("3 ! !", 720),
        ("frac ( 1 + 2 ) ( 4 )", Fraction(3, 4)),
        ("0.1 + 0.2 - 0.3", 0),
    ],
)
def test_values(text: str, expected: Fraction):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "+ 3",
            "3 +",
            "3 4",
            "( 3",
            "3 )",
            "( )",
            "3 * * 4",
            "^ 2",
            "2 ( 3 )",
            "3 frac ( 1 ) ( 2 )",
            "frac ( 1 )",
        ),
        "6 / 2 ~( 3 )",  # 9 or 1, as one reads it
        *("1 / 0", "0 ^ 0", "0 ^ - 1", "4 ^ ( 1 / 2 )", "( 1 / 2 ) !", "( - 1 ) !"),  # no value, or no rational one
        *("9 ^ 9 ^ 9", "10 ^ 1000", "2 ^ - 1000", "51 !", "3 ! ! !"),  # out of bounds
    ],
)
def test_what_has_no_value(text: str):
    assert value(text) is None


def test_bounds():
    assert value("1" + " + 1" * (MAX_TOKENS // 2 - 1)) == MAX_TOKENS // 2
    assert value("1" + " + 1" * (MAX_TOKENS // 2)) is None
    assert value("( " * MAX_DEPTH + "1" + " )" * MAX_DEPTH) == 1
    assert value("( " * (MAX_DEPTH + 1) + "1" + " )" * (MAX_DEPTH + 1)) is None
    assert value("- " * MAX_DEPTH + "1") == 1
    assert value("- " * (MAX_DEPTH + 1) + "1") is None
    assert value("1 ^ " * (MAX_DEPTH + 1) + "1") is None
    assert value(" * ".join(["9" * 38] * 4)) == (10**38 - 1) ** 4
    assert value(" * ".join(["9" * 38] * 5)) is None  # more than 512 bits


def test_rounding_to_the_digits_written():
    third = Fraction(1, 3)
    for text, right in [
        ("0.33", True),
        ("0.333", True),
        ("0.34", False),
        ("0.3334", False),
        ("0", True),
        ("1", False),
    ]:
        assert rounds_to(third, number(text)) is right, text
    assert rounds_to(Fraction(5, 2), number("2"))  # a half, either way
    assert rounds_to(Fraction(5, 2), number("3"))
    whole = Fraction(1234)
    for text, right in [("1230", True), ("1,200", True), ("1000", True), ("1240", False), ("1235", False)]:
        assert rounds_to(whole, number(text)) is right, text
    assert rounds_to(third, parse(tokens("33 %")))  # type: ignore[arg-type]
    assert rounds_to(-third, parse(tokens("- 0.33")))  # type: ignore[arg-type]
    assert rounds_to(third, parse(tokens("- 0.33"))) is False  # type: ignore[arg-type]
    assert rounds_to(third, parse(tokens("1 / 3"))) is None  # type: ignore[arg-type]


def same(first: str, second: str) -> bool:
    left, right = parse(tokens(first)), parse(tokens(second))
    assert left is not None
    assert right is not None
    return left.canonical == right.canonical


def test_what_is_the_same_but_for_spelling():
    assert same("1 + 2 + 3", "3 + ( 2 + 1.0 )")
    assert same("2 * 3 * 4", "( 4 ) * 2 * 3")
    assert same("1,000 + 1", "1 + 1000.00")
    assert not same("1 - 2", "2 - 1")
    assert not same("1 + 2 * 3", "( 1 + 2 ) * 3")
    assert not same("2 ^ 3", "3 ^ 2")


def drawn(rng: random.Random, depth: int) -> tuple[str, Fraction, int]:
    """A random expression as text, its value by Python's own arithmetic, and how tightly it binds."""
    kind = rng.choice("nnd+-*/^~") if depth else "n"
    if kind == "n":
        whole = rng.randint(1, 99)
        return str(whole), Fraction(whole), 4
    if kind == "d":
        text = f"{rng.randint(0, 9)}.{rng.randint(0, 99):02}"
        return text, Fraction(text), 4
    left, a, tight = drawn(rng, depth - 1)
    if kind == "~":
        return (f"- {left}" if tight > 2 else f"- ( {left} )"), -a, 2
    if kind == "^":
        exponent = rng.randint(1, 3)
        return (f"{left} ^ {exponent}" if tight == 4 else f"( {left} ) ^ {exponent}"), a**exponent, 3
    right, b, other = drawn(rng, depth - 1)
    rank = 0 if kind in "+-" else 1
    if kind == "/" and b == 0:
        kind = "*"
    left = left if tight >= rank else f"( {left} )"
    right = right if other > rank else f"( {right} )"
    results = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}
    return f"{left} {kind} {right}", results[kind](), rank


@pytest.mark.parametrize("seed", range(10))
def test_random_expressions_have_the_values_of_pythons_fractions(seed: int):
    rng = random.Random(seed)
    known = 0
    for _ in range(100):
        text, expected, _ = drawn(rng, rng.randint(1, 4))
        ours = value(text)
        known += ours is not None
        assert ours in (expected, None), text
    assert known >= 95  # the others are beyond the bounds
