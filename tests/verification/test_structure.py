import pytest

from sppo_lightning.verification.notation import normalize
from sppo_lightning.verification.structure import (
    group_of,
    is_name,
    is_words,
    items_of,
    option_of,
    relation_of,
    sides_of,
    split,
    words_of,
)


def test_split_leaves_brackets_whole():
    assert split("(1,2),[3,4)", ",") == ["(1,2)", "[3,4)"]
    assert split(r"\frac{1,2}{3};;4", ";") == [r"\frac{1,2}{3}", "4"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3, 5, and 7", ("3", "5", "7")),
        ("1,234", ("1,234",)),
        (r"\$1,234", ("$1,234",)),
        ("1,234, 5", ("1,234", "5")),
        (r"3 \pm 2", ("3+2", "3-2")),
        (r"\pm 3, 4", ("3", "-3", "4")),
        ("42", ("42",)),
        (",", (",",)),
    ],
)
def test_items_of(text: str, expected: tuple[str, ...]):
    assert items_of(normalize(text) or text) == expected


@pytest.mark.parametrize(
    ("text", "kind", "items"),
    [
        ("(1, 2)", "()", ("1", "2")),
        ("(1,000, 2)", "()", ("1,000", "2")),
        ("(3, 4]", "(]", ("3", "4")),
        (r"\langle 1, 2 \rangle", "()", ("1", "2")),
        (r"\{1, 2\}", "set", ("1", "2")),
        (r"x \in [1, 2)", "[)", ("1", "2")),
        ("x > 2", "()", ("2", r"\infty")),
        (r"2 \ge x", "(]", (r"-\infty", "2")),
        (r"4 > x \ge -1", "[)", ("-1", "4")),
        (r"\{x \mid x > 2\}", "()", ("2", r"\infty")),
        (r"(1,2) \cup (3,4)", "union", ("(1,2)", "(3,4)")),
        (r"\mathbb{R}", "()", (r"-\infty", r"\infty")),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "()", ("1", "2")),
        (r"\begin{bmatrix} 1 & 2 \\[4pt] 3 & 4 \end{bmatrix}", "matrix 2 2", ("1", "2", "3", "4")),
        (r"2\begin{pmatrix} 1 & 2 \end{pmatrix}", "matrix 2", ("2×(1)", "2×(2)")),
        ("3 : 4", ":", ("3", "4")),
        ("[5]", "[", ("5",)),
    ],
)
def test_group_of(text: str, kind: str, items: tuple[str, ...]):
    assert group_of(normalize(text)) == (kind, items)


@pytest.mark.parametrize("text", ["(x+1)(x-1)", "(5)", "5", "f(1,2)", "x+y<3", r"\text{east}", "1<x>2", ""])
def test_no_group(text: str):
    assert group_of(normalize(text)) is None


def test_relations_name_their_variable():
    assert relation_of("t≤2") == ("t", ("(]", (r"-\infty", "2")))
    assert relation_of("x<x") is None


def test_sides():
    assert sides_of("41=42") == ["41", "42"]
    assert sides_of("f(x)=2x=5") == ["f(x)", "2x", "5"]
    assert sides_of("True==42") == ["True==42"]
    assert sides_of("=5") == ["=5"]


@pytest.mark.parametrize(
    "side", ["x", "x_1", r"\theta", "f(2)", "m+n", r"\angle ABC", "|S|", r"\text{Area}", "(x,y)", "x_{\\max}"]
)
def test_names(side: str):
    assert is_name(side, "5")


@pytest.mark.parametrize("side", ["5", "2x", "x+1", "x^2", r"\pi", "e", "i", r"\sqrt{x}", "x<", "x!", ""])
def test_no_names(side: str):
    assert not is_name(side, "5")


def test_where_unknowns_are_sought_only_a_plain_name_is_one():
    assert is_name("y", "2x")
    assert is_name("f(x)", "2x")
    assert is_name("f'(x)", "2x")
    assert not is_name("xy", "2x")
    assert not is_name(r"\ln y", "2x")
    assert not is_name(r"\text{not }x", "5")
    assert not is_name("(y,x)", "(1,2)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(B)", "B"),
        ("B.", "B"),
        (r"\text{(B)}42", "B"),
        ("(B) or (C)", None),
        ("[B]", "B"),
        ("b", None),
        ("AB", None),
    ],
)
def test_option_of(text: str, expected: str | None):
    assert option_of(text) == expected


def test_words():
    assert [is_words(text) for text in ("east", "No", "ab", r"\sin x", r"\arcsin{x}", "xyz", r"5\text{p.m.}")] == [
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert words_of("The East.") == "east"
    assert words_of(r"3:30\text{P.M.}") == "3:30pm"
    assert words_of("1.5") == "1.5"
