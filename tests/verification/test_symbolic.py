r"""Expressions, compared by their values: what runs in workers, run here on text that is known to be harmless."""

import subprocess
import sys

import pytest

from sppo_lightning.verification.notation import normalize
from sppo_lightning.verification.symbolic import UnreadableGold, equal


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\sqrt{2}+3", r"3+\sqrt{2}"),
        (r"2(3r^2-2r-12)", r"6r^2-4r-24"),
        (r"\frac{\pi}{10}", r"0.1\pi"),
        (r"3\sqrt{13}", r"\sqrt{117}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
        (r"\sin^2 x", r"1-\cos^2 x"),
        (r"e^{i\pi/3}", r"\frac{1}{2}+\frac{\sqrt{3}}{2}i"),
        (r"\sin 30^\circ", r"\frac12"),
        ("2^{10}", "1024"),
        (r"\binom{5}{2}", "10"),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
        ("y-2x=3", "y=2x+3"),
        ("f(x)+1", "1+f(x)"),
    ],
)
def test_equal(answer: str, gold: str):
    assert equal(normalize(answer), normalize(gold))


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3", r"3\sqrt{13}"),
        ("1.41421356237309504880168872420969807856967187537694", r"\sqrt{2}"),
        (r"\sqrt{2}+10^{-60}", r"\sqrt{2}"),
        ("q-p", "p-q"),
        ("x^2", "y^2"),
        (r"\sqrt{x^2}", "x"),  # not where x is negative
        ("|x|", "x"),
        ("X", "x"),
        ("x+y=3", "x+y=4"),
        ("2x=10", "x=5"),
        ("g(x)", "f(x)"),
    ],
)
def test_not_equal(answer: str, gold: str):
    assert not equal(normalize(answer), normalize(gold))


def test_a_tolerance_is_for_constants_alone():
    assert equal("3.1416", r"\pi", 1e-4)
    assert not equal("3.1416", r"\pi", 1e-6)
    assert not equal("1.0001x", "x", 1e-3)


def test_a_gold_that_is_no_mathematics():
    with pytest.raises(UnreadableGold):
        equal("5", r"\star\star")


PROBE = r"""
import builtins, json, sys
from pathlib import Path
from sppo_lightning.verification.comparison import Comparison
from sppo_lightning.verification.extraction import extract_answer
from sppo_lightning.verification.notation import Malformed, normalize
from sppo_lightning.verification.symbolic import equal

assert equal("x+1", "1+x")  # everything is loaded
handed, asked = [], 0

def watch(place, name):
    original = getattr(place, name)
    def watched(text, *args, **kwargs):
        if isinstance(text, str):
            handed.append((name, text))
        return original(text, *args, **kwargs)
    setattr(place, name, watched)

for module in list(sys.modules.values()):
    if module.__name__.split(".")[0] in ("sympy", "latex2sympy2_extended", "math_verify"):
        for name in ("sympify", "_sympify", "parse_expr"):
            if callable(getattr(module, name, None)):
                watch(module, name)
watch(builtins, "eval")

def leaf(answer, gold):
    global asked
    asked += 1
    return equal(answer, gold)

for line in Path(sys.argv[1]).read_text().splitlines():
    case = json.loads(line)
    try:
        Comparison(leaf).agree(normalize(extract_answer(case["response"]) or ""), normalize(case["gold"]))
    except Exception:  # what the parser refuses
        continue
print(asked, handed)
"""


@pytest.mark.parametrize("cases", [pytest.param("expressions", marks=pytest.mark.slow), "structures"])
def test_no_text_reaches_sympify_or_eval(cases: str, request: pytest.FixtureRequest):
    path = request.path.parent / "cases" / f"{cases}.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", PROBE, path], capture_output=True, text=True, check=True, timeout=120
    )
    asked, handed = run.stdout.splitlines()[-1].split(" ", 1)
    assert int(asked) > 50
    assert handed == "[]"
