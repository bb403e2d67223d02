import json
from pathlib import Path

import pytest

from sppo_lightning.verification.notation import normalize
from sppo_lightning.verification.refusals import is_refused, why_ill_formed

GOLDS = [json.loads(line) for line in (Path(__file__).parent / "cases" / "golds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "10^{10^{10}}",
        "10^{-10^{10}}",
        "(10^6)!",
        "10000!",
        "2^{1000000}",
        "7**7",
        "(" * 17 + "x" + ")" * 17,
        "1 2",
        "1" * 100,
        r"\zeros(100000,100000)",
        r"\input{/etc/passwd}",
        "__import__('os').system('touch x')",
        r"3.14 ≈ \pi",
        "x == 5",
        r"0.333\ldots",
    ],
)
def test_refused(answer: str):
    assert is_refused(normalize(answer), "5")


@pytest.mark.parametrize("answer", [r"\frac{\sqrt{3}}{3}", "2^{2024}-1", "e^{x^2}", "5!", r"\binom{10}{3}"])
def test_not_refused(answer: str):
    assert not is_refused(normalize(answer), r"\pi")


def test_what_the_gold_answer_is_made_of_is_not_refused():
    assert is_refused(r"\star", "5")
    assert not is_refused(r"\star", r"2\star")
    assert not is_refused("(n+1)!", "n!")


@pytest.mark.parametrize("case", GOLDS, ids=lambda case: repr(case["gold"])[:40])
def test_well_formed(case: dict[str, object]):
    assert (why_ill_formed(case["gold"]) is None) is case["well_formed"]  # type: ignore[arg-type]


def test_reasons_name_the_gold():
    assert why_ill_formed(" ") == "the gold answer is empty"
    assert why_ill_formed("1" * 513) == "the gold answer is longer than 512 characters"
    assert why_ill_formed(r"\frac{1") == r"the gold answer '\\frac{1' cannot be read: a brace is never closed"
    assert why_ill_formed("(3,") == "the brackets of the gold answer '(3,' do not match"
    assert why_ill_formed("2+") == "the gold answer '2+' breaks off"
