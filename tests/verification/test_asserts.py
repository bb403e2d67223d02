"""Asserts taken apart: what goes into the sandbox, and what is made of what comes out."""

import json
from typing import Any

import pytest

from sppo_lightning.verification.asserts import take_apart
from sppo_lightning.verification.code import run_tests
from sppo_lightning.verification.expressions import MAX_ROUNDS, Unanswered

SECRET = "wanted-5d1c"


def asked(case: dict[str, Any]) -> list[str]:
    return [expression for step in case["steps"] if step[0] == "ask" for expression in step[1]]


def done(case: dict[str, Any]) -> str:
    return "\n".join(step[1] for step in case["steps"] if step[0] == "do")


@pytest.mark.parametrize(
    ("code", "inside"),
    [
        ("assert f(1) == 2", ["f(1)"]),
        ("assert 2 == f(1)", ["f(1)"]),
        ("assert f(1) == 2 and not f(2)", ["f(1)", "f(2)"]),
        ("assert 1 < f(1) < 3", ["f(1)"]),
        ("assert abs(f(1) - 2.5) < 1e-6", ["f(1)"]),
        ("import math\nassert math.isclose(f(1), 2.5, rel_tol=1e-3)", ["f(1)"]),
        ("assert f(1) in (2, 3)", ["f(1)"]),
        ("assert [f(1), 2] == [1, 2]", ["f(1)"]),
        ("assert all(f(i) == i * i for i in range(3))", ["f(0)", "f(1)", "f(2)"]),
        ("assert all(f(i, j) for i in [1] for j in (2, 3) if j > i + 1)", ["all((f(i, j) for i in [1] for j in (2, 3) if j > i + 1))"]),
        ("for x, y in [(1, 2), (3, 4)]:\n    assert f(x) == y", ["f(x)", "f(x)"]),
        ("def check(g, want):\n    assert g(1) == want\ncheck(f, 2)", ["g(1)"]),
        ("def test():\n    assert f(1) == 2\n    assert f(2) == 3", ["f(1)"]),
        ("if __name__ == '__main__':\n    assert f(1) == 2", ["f(1)"]),
        ("assert sorted(f(2), reverse=True) == [1, 0]", ["sorted(f(2), reverse=True)"]),
        ("assert sum(10, 15) == 6", ["sum(10, 15)"]),
        ("assert sum([1, 2]) == 6", ["sum([1, 2])"]),
        ("assert f(1) is g(1)", ["f(1) is g(1)"]),
        ("assert type(f(1)) == int and isinstance(f(2), (int, str))", ["f(1)", "f(2)"]),
        ("assert f(x)[0].y == 2", ["f(x)[0].y"]),
        ("if f(1):\n    assert f(2) == 2\nelse:\n    assert f(3) == 3", ["f(1)", "f(2)", "f(3)"]),
        ("assert s.pop() == s.top() + 1", ["s.pop()", "s.top()"]),
        ("assert '%s' % f(1) == '2'", ["'%s' % f(1)"]),
        ("x = [1]\nassert f(x) == x", ["f(x)", "x"]),  # which `f` may have changed
    ],
)  # fmt: skip
def test_what_is_asked_inside(code: str, inside: list[str]):
    cases, judges = take_apart(code)
    assert asked(cases[0]) == inside
    assert len(cases) == len(judges)


@pytest.mark.parametrize(
    "code",
    [
        "assert f(1) == 'X'",
        "assert 'X' == f(1)",
        "want = 'X'\nassert f(1) == want",
        "x, want = 1, ['X']\nassert f(x) == want",
        "assert f(1) == '' + 'X'",
        "assert f(1) == str('X')",
        "assert f(1) in {'X': 1}",
        "assert f(1) == 'x'.upper() and 'X' in f(2), 'X'",
        "for a, b in [(1, 'X')]:\n    assert f(a) == b",
        "cases = [(1, 'X')]\nfor a, b in cases:\n    got = f(a)\n    assert got == b",
        "def check(g):\n    assert g(1) == 'X'\ncheck(f)",
        "def check(g, w):\n    assert g(1) == w\ncheck(f, 'X')",
        "def test():\n    assert f(1) == 'X'",
    ],
)
def test_what_is_expected_stays_outside(code: str):
    cases, judges = take_apart(code.replace("X", SECRET).replace("x'", f"{SECRET}'"))
    assert cases
    assert SECRET not in json.dumps(cases)
    assert len(judges) == 1


@pytest.mark.parametrize(
    ("code", "answers", "holds"),
    [
        ("assert f(1) == 2", [2], True),
        ("assert f(1) == 2", [3], False),
        ("assert f(1) == 2", ["2"], False),
        ("assert f(1) == 2 and f(2) == 3", [2, 4], False),
        ("assert abs(f(1) - 2.5) < 1e-6", [2.5000001], True),
        ("assert abs(f(1) - 2.5) < 1e-6", [2.51], False),
        ("assert 1 < f(1) < 3", [3], False),
        ("assert round(f(1), 2) == 0.67", [2 / 3], True),
        ("assert f(1) == {1, 2}", [frozenset({2, 1})], True),
        ("assert f(1) is None", [None], True),
        ("assert f(1) is not None", [0], True),
        ("assert f(1) is True", [1], False),
        ("assert type(f(1)) is set", [frozenset()], True),
        ("assert all(f(i) == i * i for i in range(3))", [0, 1, 4], True),
        ("assert all(f(i) == i * i for i in range(3))", [0, 1, 5], False),
        ("assert f(1) == 10 ** 9 + 7", [10**9 + 7], True),
        ("if f(1):\n    assert f(2) == 2\nelse:\n    assert f(3) == 3", [0, 9, 3], True),
        ("if f(1):\n    assert f(2) == 2\nelse:\n    assert f(3) == 3", [1, 9, 3], False),
    ],
)
def test_what_is_made_of_answers(code: str, answers: list[Any], holds: bool):
    (judge,) = take_apart(code)[1]
    assert judge([[(True, answer) for answer in answers]]) is holds


def test_an_answer_that_is_not_there_is_missed_only_where_it_is_needed():
    (judge,) = take_apart("assert f(1) is None or len(f(1)) == 0")[1]
    assert judge([[(True, None), (False, "TypeError")]])
    with pytest.raises(Unanswered, match="TypeError"):
        judge([[(True, 1), (False, "TypeError")]])


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("assert 2 ** f(1) == 3", 10**12),
        ("assert f(1) % 5 == 3", "%1000000000d"),
        ("assert [0] * f(1) == 3", 10**12),
        ("assert f(1) + f(1) == 3", [0] * 60_000),
    ],
)
def test_no_answer_holds_the_trainer_up(code: str, answer: Any):
    (judge,) = take_apart(code)[1]
    with pytest.raises(OverflowError, match="too large to be computed"):
        judge([[(True, answer)] * 2])


def test_the_sandbox_says_what_holds_only_where_it_is_asked_for_the_whole():
    judges = take_apart("assert f(1) == 2\nassert P(1) == P(1)")[1]
    assert judges[1]([True])
    with pytest.raises(TypeError):
        judges[0]([True])


def test_asserts_on_constants_alone_ask_nothing():
    assert take_apart("assert True, 'this always passes'")[0] == []
    (judge,) = take_apart("assert 1 == 2")[1]
    assert judge([[]]) is False


def test_a_case_for_each_assert_and_for_each_loop():
    code = "assert f(1) == 1\nx = g()\nfor i in range(3):\n    assert f(i, x) == i\nassert f(x) == 2"
    cases, judges = take_apart(code)
    assert [asked(case) for case in cases] == [["f(1)"], ["f(i, x)"] * 3, ["f(x)"]]
    assert done(cases[1]) == "x = g()\ni = 0\ni = 1\ni = 2"
    assert judges[1]([[(True, 0)], [(True, 1)], [(True, 2)]])
    assert not judges[1]([[(True, 0)], [(True, 1)]])  # one is missing
    assert not judges[1]([[(True, 0)], [(True, 1)], [(True, 3)]])


@pytest.mark.parametrize(
    "code",
    [
        "for i in numbers():\n    assert f(i) == i",
        "for i in range(3):\n    if f(i):\n        break\n    assert f(i) == i",
        f"for i in range({MAX_ROUNDS + 1}):\n    assert f(i) == i",
        "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
        "with g() as x:\n    assert f(x) == 1",
        "def check(x, y=2):\n    assert f(x) == y\ncheck(1)",
    ],
)
def test_what_is_followed_no_further_runs_inside(code: str):
    (case,), (judge,) = take_apart(code)
    assert done(case) == code
    assert asked(case) == []
    assert judge([[]]) is True


ANY = """
class Any{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __sub__(self, other): return 0
    def __hash__(self): return 0
    def __bool__(self): return True
def f(*args): return Any()
"""


@pytest.mark.sandbox
@pytest.mark.parametrize("base", ["", "(int)", "(str)", "(list)", "(dict)", "(float)"])
def test_an_object_that_equals_everything_is_no_answer(base: str):
    code = """
    assert f(1) == 7
    assert 7 == f(1)
    assert f(1) == 7 and f(2) == 8
    assert 6 < f(1) < 8
    assert abs(f(1) - 7.5) < 1e-6
    assert f(1) in [7, 8] or f(2) == 9
    assert [f(1), f(2)] == [7, 8]
    assert all(f(i) == i + 7 for i in range(3))
    for i in range(3):
        assert f(i) == i + 7
    got = f(1)
    assert got == 7
    def check(g):
        for a, b in [(1, 7), (2, 8)]:
            assert g(a) == b
    check(f)
    """
    report = run_tests(ANY.format(base=base), {"kind": "asserts", "code": "if True:" + code})
    assert (report.passed, report.total) == (0, 11)


@pytest.mark.sandbox
def test_asserts_build_on_each_other():
    stack = """
class Stack:
    def __init__(self): self.entries = []
    def push(self, x): self.entries.append(x)
    def pop(self): return self.entries.pop() if self.entries else None
    def __eq__(self, other): return self.entries == other.entries
"""
    code = "s = Stack()\ns.push(1)\nassert s.pop() == 1\nassert s.pop() is None\nassert s == Stack()\n"
    code += "assert Stack() != Stack()\na = [3, 1]\na.sort()\nassert a == [1, 3]"
    report = run_tests(stack, {"kind": "asserts", "code": code})
    assert report.cases == ("passed", "passed", "passed", "failed", "passed")


@pytest.mark.sandbox
def test_an_assert_that_ends_the_process_takes_no_other_with_it():
    submission = "import os\ndef f(x, s):\n    if x == 1: os._exit(0)\n    if x == 3: 1 / 0\n    return x + s[0]"
    code = "s = list(range(1, 2))\n" + "\n".join(f"assert f({i}, s) == {i + 1}" for i in range(5))
    report = run_tests(submission, {"kind": "asserts", "code": code})
    assert report.cases == ("passed", "error", "passed", "error", "passed")
