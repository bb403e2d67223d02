from fractions import Fraction

import pytest

from sppo_lightning.verification.numbers import based_number, exact_number, quantity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-7", Fraction(-7)),
        (".35625", Fraction(57, 160)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1 234 567", Fraction(1234567)),
        (r"-\frac{35}{9}", Fraction(-35, 9)),
        (r"\frac{-1.5}{2}", Fraction(-3, 4)),
        ("3/4", Fraction(3, 4)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("-1 1/2", Fraction(-3, 2)),
        ("50%", Fraction(1, 2)),
        ("50 percent", Fraction(1, 2)),
        ("3×10^{-2}", Fraction(3, 100)),
        ("4e-7", Fraction(4, 10**7)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-1.1\overline{6}", Fraction(-7, 6)),
        ("0.(142857)", Fraction(1, 7)),
        (r".\overline{9}", Fraction(1)),
        ("1/0", None),
        (r"1\frac{-1}{2}", None),
        ("1,23", None),
        ("1 2", None),
        ("1.2.3", None),
        ("٣", None),  # a digit of another script, which `normalize` would have replaced
        ("inf", None),
        ("9" * 121, None),
    ],
)
def test_exact_number(text: str, expected: Fraction | None):
    assert exact_number(text) == expected


@pytest.mark.parametrize(
    ("text", "body", "unit"),
    [
        (r"5.4\text{cents}", "5.4", "cent"),
        (r"15\text{cm}^2", "15", "cm2"),
        (r"15\text{square centimeters}", "15", "cm2"),
        ("$18.90", "18.90", "$"),
        ("-$5", "-5", "$"),
        ("5 dollars", "5", "$"),
        ("90°", "90", "degree"),
        ("180°/2", "180/2", "degree"),
        ("5 inches", "5", "in"),
        ("5cm", "5", "cm"),
        ("5 m", "5", "m"),
        (r"9.8\text{m/s}^2", "9.8", "m/s2"),
        (r"60\text{miles per hour}", "60", "mi/h"),
        (r"60\text{mph}", "60", "mi/h"),
        (r"3\sqrt{2}\text{inches}", r"3\sqrt{2}", "in"),
        (r"5\text{apples}", "5", "apple"),
        ("5 apples", "5", "apple"),
        ("5xy", "5xy", None),
        ("5 xy", "5 xy", None),
        ("5x", "5x", None),
        (r"5\text{million}", r"5\text{million}", None),
        (r"5\text{or more}", r"5\text{or more}", None),
        (r"\sin 30°", r"\sin 30°", None),
    ],
)
def test_quantity(text: str, body: str, unit: str | None):
    assert quantity(text) == (body, unit)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1011_2", ("1011", 2)),
        ("(1011)_2", ("1011", 2)),
        (r"052_{\text{eight}}", ("52", 8)),
        ("1A_{16}", ("1A", 16)),
        ("1011", None),
        ("x_2", None),
    ],
)
def test_based_number(text: str, expected: tuple[str, int] | None):
    assert based_number(text) == expected
