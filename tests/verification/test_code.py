"""Programs against their tests: what passes, what does not, and why."""

import json
import math
from typing import Any

import pytest

from sppo_lightning.verification.code import TestReport, equal, last_code_block, plan, run_tests

ADD = {
    "kind": "function",
    "fn": "add",
    "cases": [{"args": [1, 2], "expected": 3}, {"args": ["a", "b"], "expected": "ab"}],
}
RIGHT = "def add(a, b):\n    return a + b\n"


def function(name: str, *cases: tuple[list[Any], Any]) -> dict[str, Any]:
    return {"kind": "function", "fn": name, "cases": [{"args": a, "expected": e} for a, e in cases]}


def stdio(*cases: tuple[str, str]) -> dict[str, Any]:
    return {"kind": "stdio", "cases": [{"stdin": given, "stdout": wanted} for given, wanted in cases]}


def asserts(code: str) -> dict[str, Any]:
    return {"kind": "asserts", "code": code}


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("submission", "tests", "passed"),
    [
        (RIGHT, ADD, 2),
        ("def add(a, b):\n    return a + b if a == 1 else ''", ADD, 1),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", ADD | {"fn": "Solution.add"}, 2),
        ("class Solution:\n    def f(self, x: List[int]) -> Optional[int]:\n        return max(x)",
         function("Solution.f", ([[1, 3, 2]], 3)), 1),
        ("import math\ndef f(x):\n    return math.sqrt(x)", function("f", ([2], 2**0.5), ([4], 2)), 2),
        ("def f(x):\n    return tuple(x)", function("f", ([[1, [2]]], [1, [2]])), 1),
        ("def f():\n    return {1: 'a', 'b': [None, True]}", function("f", ([], {1: "a", "b": [None, True]})), 1),
        ("def f(n):\n    return 2 ** n", function("f", ([20000], 2**20000)), 1),
        ("def f():\n    return float('nan'), float('inf')", function("f", ([], [math.nan, math.inf])), 1),
        ("n = int(input())\nprint(n * 2)", stdio(("3\n", "6\n"), ("4", "8")), 2),
        ("import sys\nfor l in sys.stdin:\n    print(sum(map(int, l.split())))", stdio(("1 2\n3 4\n", "3\n7")), 1),
        ("print('a  ')\nprint()", stdio(("", "a\n")), 1),
        ("if __name__ == '__main__':\n    print(open(0).read())", stdio(("ü\n", "ü\n")), 1),
        ("print(6)\nexit()", stdio(("", "6")), 1),
        ("import threading, time\ndef main():\n    time.sleep(0.1)\n    print(6)\nthreading.Thread(target=main).start()",
         stdio(("", "6")), 1),
        ("import atexit\natexit.register(print, 6)", stdio(("", "6")), 1),
        ("import io, sys\nprint(6)\nsys.stdout = io.StringIO()\nprint(7)", stdio(("", "6")), 1),
        ("import sys\nprint(6)\nsys.stdout.close()", stdio(("", "6")), 1),
        ("out = open(1, 'w')\nout.write('6')", stdio(("", "6")), 1),
        ("\ufeffdef f(x: int): pass\nprint(f.__annotations__['x'] is int, __file__)",
         stdio(("", "True /tmp/submission.py")), 1),
        ("def f(n):\n    return n and 1 + f(n - 1)\nprint(f(990))", stdio(("", "990")), 1),
        ("from collections import Counter\ndef f(s):\n    return Counter(s)", function("f", (["aab"], {"a": 2, "b": 1})), 1),
        ("from fractions import Fraction\ndef f(n):\n    return Fraction(n, 2) + 1j * 0 if n < 0 else Fraction(n, 2)",
         asserts("assert f(1) == 0.5\nassert f(-2) == complex(-1, 0)"), 2),
        ("def sq(x):\n    return x * x", asserts("assert sq(3) == 9\nassert sq(2) != 5\nassert not sq(0)"), 3),
        ("def sq(x):\n    return x * x", asserts("import math\nassert math.isclose(sq(1.5), 2.25), 'close'"), 1),
        ("def sq(x):\n    return x * x", asserts("for i in range(3):\n    assert sq(i) == i * i"), 1),
        (RIGHT, asserts("def check(candidate):\n    assert candidate(1, 2) == 3\n    x = 2\n"
                        "    assert candidate(x, x) == 2 * x\n\ncheck(add)"), 2),
    ],
)  # fmt: skip
def test_what_passes(submission: str, tests: dict[str, Any], passed: int):
    report = run_tests(submission, tests)
    total = len(report.cases)
    assert (report.passed, report.total) == (passed, total)
    assert report.status == ("passed" if passed == total else "failed")
    assert report.fraction == passed / total
    assert 0 < report.seconds < 5


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("submission", "tests", "status"),
    [
        ("def add(a, b):\n    return a - b if a == 1 else 'ba'", ADD, "failed"),
        ("def add(a, b):\n    return True if a == 1 else 'a'", function("add", ([1, 0], 1)), "failed"),
        ("def add(a, b):\n    return str(a + b)", function("add", ([1, 2], 3)), "failed"),
        ("def add(a, b:\n    return a", ADD, "error"),
        ("def plus(a, b):\n    return a + b", ADD, "error"),
        ("def add(a, b):\n    raise KeyError(a)", ADD, "error"),
        ("def add(a, b):\n    return object()", ADD, "error"),
        ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", ADD, "error"),
        ("print(6)\nraise ValueError", stdio(("", "6")), "error"),
        ("print(6)\nexit(1)", stdio(("", "6")), "error"),
        ("print('6 ' * 2)", stdio(("", "6\n6")), "failed"),
        ("\ud800", ADD, "error"),
        ("x = 1\0", ADD, "error"),
        ("def sq(x):\n    return x", asserts("assert sq(3) == 9\nassert sq(2) == 4"), "failed"),
        ("def sq(x):\n    return x", asserts("for i in range(3):\n    assert sq(i) == i * i"), "failed"),
        ("def sq(x):\n    return x", asserts("while True:\n    assert sq(2) == 4\n    break"), "error"),
    ],
)
def test_what_does_not(submission: str, tests: dict[str, Any], status: str):
    report = run_tests(submission, tests)
    assert (report.passed, report.status) == (0, status)


@pytest.mark.sandbox
def test_an_endless_case_takes_no_other_with_it():
    tests = function("f", ([0], 0), ([1], 1), ([2], 2))
    report = run_tests("def f(n):\n    while n == 1:\n        pass\n    return n", tests, timeout_seconds=1.0)
    assert report.cases == ("passed", "timeout", "passed")
    assert report.status == "timeout"
    assert report.seconds > 0.2  # it was on the CPU


def test_no_expected_value_goes_into_the_sandbox():
    secret = "wanted-5d1c"
    for tests in (
        function("f", ([1], secret)),
        stdio(("1", secret)),
        asserts(f"x = 1\nassert f(x) == {secret!r}\nassert {secret!r} != f(2)"),
    ):
        job, judges = plan(tests)
        assert secret not in json.dumps(job)
        asked = tests["kind"] == "asserts"
        assert judges[0]([[(True, secret)]] if asked else secret) is True
        assert judges[0]([[(True, "else")]] if asked else "else") is False


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ({"kind": "guess"}, "Tests of the kind 'guess' are not known; use function, stdio or asserts."),
        (function("f"), "Tests of the kind 'function' without a case say nothing."),
        ({"kind": "function", "cases": []}, "lack something, or have too much of it: 'fn'"),
        (function("a.b.c", ([], 1)), "`fn`='a.b.c' is neither a function nor a class's method"),
        (stdio((1, "2")), "1 is no text"),  # type: ignore[arg-type]
        (asserts("assert f( == 1"), "`code` of the tests cannot be parsed"),
        (asserts("x = 1"), "Tests of the kind 'asserts' without a case say nothing."),
    ],
)
def test_tests_that_are_none(tests: dict[str, Any], said: str):
    with pytest.raises(ValueError, match="^") as raised:
        run_tests(RIGHT, tests)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.3000001, 0.3, False),
        (10**18, 10**18 + 1, False),
        (True, 1, False),
        (1, True, False),
        ("1", 1, False),
        ((1, 2), [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        (frozenset({1, 2}), {2, 1}, True),
        ({"a": [1]}, {"a": (1,)}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (None, None, True),
        (None, False, False),
        (math.nan, math.nan, True),
        (math.inf, -math.inf, False),
    ],
)
def test_equality_of_plain_values(value: Any, expected: Any, same: bool):
    assert equal(value, expected) is same


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("first\n```python\nx = 1\n```\nthen\n```py\nx = 2\ny = 3\n```\nend", "x = 2\ny = 3"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1"),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2"),
        ("<think>\n```python\nx = 1\n```\n</think> no code", None),
        ("```python\nx = 1", None),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1"),
        ("x = 1", None),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
        ("```bash\nls\n```\nas above", None),
    ],
)
def test_the_last_block(response: str, code: str | None):
    assert last_code_block(response) == code


def test_a_report_says_what_there_is_to_say():
    report = TestReport(passed=1, total=4, status="timeout", seconds=2.5)
    assert report.fraction == 0.25
