import ast
import random
from typing import Any

import pytest

from sppo_lightning.verification.code import plan
from sppo_lightning.verification.hidden_tests import split_tests


def function_tests(count: int) -> dict[str, Any]:
    cases = [{"args": [i, 1], "expected": i + 1} for i in range(count)]
    return {"kind": "function", "fn": "add", "cases": cases, "reference_seconds": 2.0}


def stdio_tests(count: int) -> dict[str, Any]:
    return {"kind": "stdio", "cases": [{"stdin": f"{i}\n", "stdout": f"{i + 1}\n"} for i in range(count)]}


@pytest.mark.parametrize("tests", [function_tests(10), stdio_tests(10)], ids=["function", "stdio"])
@pytest.mark.parametrize(("share", "hidden"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.25, 3), (0.5, 5), (0.99, 9)])
def test_each_case_is_on_one_side(tests: dict[str, Any], share: float, hidden: int):
    visible, kept = split_tests(tests, share, "problem 1")
    rest = [] if kept is None else kept["cases"]
    assert len(rest) == hidden
    assert [case for case in tests["cases"] if case not in rest] == visible["cases"]  # in their order
    assert [case for case in tests["cases"] if case not in visible["cases"]] == rest
    for side in filter(None, (visible, kept)):
        assert {k: v for k, v in side.items() if k != "cases"} == {k: v for k, v in tests.items() if k != "cases"}
        assert len(plan(side)[1]) == len(side["cases"])


def test_the_choice_depends_on_the_key_and_the_cases_and_on_nothing_else():
    tests = function_tests(12)
    one = split_tests(tests, 0.5, "a")
    assert split_tests(function_tests(12), 0.5, "a") == one
    assert split_tests(tests, 0.5, "b") != one
    assert one[1] is not None
    shuffled = random.Random(3).sample(tests["cases"], 12)
    again = split_tests({**tests, "cases": shuffled}, 0.5, "a")
    assert again[1] is not None
    assert sorted(map(str, again[1]["cases"])) == sorted(map(str, one[1]["cases"]))
    assert tests == function_tests(12)


@pytest.mark.parametrize("count", [0, 1])
def test_what_cannot_be_split_stays_visible(count: int):
    assert split_tests(function_tests(count), 0.5, "a") == (function_tests(count), None)


def test_equal_cases_are_on_the_same_side():
    tests = {"kind": "stdio", "cases": stdio_tests(4)["cases"] * 3}
    visible, hidden = split_tests(tests, 0.5, "a")
    assert hidden is not None
    assert len(visible["cases"]) == len(hidden["cases"]) == 6
    assert [case for case in visible["cases"] if case in hidden["cases"]] == []
    assert split_tests({"kind": "stdio", "cases": stdio_tests(1)["cases"] * 3}, 0.5, "a")[1] is None


def asserts_in(tests: Any) -> list[str]:
    return [ast.unparse(n) for n in ast.walk(ast.parse(tests["code"])) if isinstance(n, ast.Assert)]


MBPP = "import math\nassert f(1) == 1\nx = 3\nassert f(x) == 9, 'nine'\nassert f(4) == 16\nassert not f(0)\n"
HUMAN_EVAL = (
    "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 1\n    assert candidate(2) == 4\ncheck(f)"
)


@pytest.mark.parametrize(("code", "cases"), [(MBPP, 4), (HUMAN_EVAL, 2)])
def test_asserts_are_split_and_what_is_around_them_is_kept(code: str, cases: int):
    tests = {"kind": "asserts", "code": code}
    visible, hidden = split_tests(tests, 0.5, "a")
    assert hidden is not None
    assert len(asserts_in(visible)) == len(asserts_in(hidden)) == cases // 2
    assert sorted(asserts_in(visible) + asserts_in(hidden)) == sorted(asserts_in(tests))
    assert all(side["kind"] == "asserts" and len(plan(side)[1]) == cases // 2 for side in (visible, hidden))
    for line in ("import math", "x = 3") if code is MBPP else ("METADATA = {}", "check(f)"):
        assert line in visible["code"]
        assert line in hidden["code"]


@pytest.mark.parametrize(
    "code",
    [
        "assert f(1) == 1",
        "for i in range(3):\n    assert f(i) == i\nassert f(9) == 9",
        "try:\n    assert f(1)\nexcept ValueError:\n    pass\nassert f(2)",
        "assert f(1) ==",
        "x = 1",
        "assert f(1)\nassert f(1)",
    ],
    ids=["one", "a loop", "a try", "no Python", "no assert", "the same twice"],
)
def test_asserts_that_cannot_be_split_stay_visible(code: str):
    tests = {"kind": "asserts", "code": code}
    assert split_tests(tests, 0.5, "a") == (tests, None)


@pytest.mark.parametrize("tests", [{}, {"kind": "stdio"}, {"kind": "asserts"}, {"kind": "asserts", "code": None}])
def test_tests_that_are_none_are_left_to_who_runs_them(tests: dict[str, Any]):
    assert split_tests(tests, 0.5, "a") == (tests, None)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_something_must_be_visible(share: float):
    with pytest.raises(ValueError, match=r"A hidden share of .* leaves no visible case"):
        split_tests(function_tests(2), share, "a")
