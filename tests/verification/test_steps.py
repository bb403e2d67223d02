import time

import pytest

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.verification.steps import StepScorer, judge_arithmetic, split_steps, step_quality

PROMPT = Prompt("2+3=", "5", "sums", 7)


def test_numbered_steps_go_from_one_marker_to_the_next():
    response = """Let us see. It is easy.
**Step 1:** Add.
3 + 4
= 7
Step 2: Double it: 7 * 2 = 14.
So it is 14."""
    assert split_steps(response) == [
        "Let us see.",
        "It is easy.",
        "Add.\n3 + 4 = 7",
        "Double it: 7 * 2 = 14.\nSo it is 14.",
    ]
    for markers in (
        ["1.", "2."],
        ["1)", "2)"],
        ["(1)", "(2)"],
        ["### Step 1", "### step 2:"],
        ["**1.**", "**2.**"],
    ):
        assert split_steps(f"{markers[0]} 3 + 4 = 7\n{markers[1]} 7 - 1 = 6") == ["3 + 4 = 7", "7 - 1 = 6"]


def test_other_lines_are_cut_into_sentences():
    response = (
        "<think>First 3.5 + 4 = 7.5. Then 2 * 3 = 6; so!\n* 1 + 1 = 2\n- done\n- 3 + 5 = 2</think>\n1. only one"
    )
    assert split_steps(response) == [
        "First 3.5 + 4 = 7.5.",
        "Then 2 * 3 = 6;",
        "so!",
        "1 + 1 = 2",
        "done",
        "- 3 + 5 = 2",  # which may be a line of a calculation
        "only one",
    ]


def test_a_chain_over_several_lines_is_one_step():
    response = "\\begin{aligned}\n3 + 4 &= 7 \\\\\n&= 14/2 \\\\\n&= 8\n\\end{aligned}"
    assert split_steps(response) == ["3 + 4 &= 7 = 14/2 = 8"]
    assert judge_arithmetic(split_steps(response)) == [False]


def test_the_lines_of_a_matrix_are_not_taken_for_a_side():
    response = r"\begin{pmatrix} 3 \\ 4 \end{pmatrix} = 3 + 4 + 5"
    assert judge_arithmetic(split_steps(response)) == [None, None]


def test_a_step_counts_once():
    assert split_steps("So 1 + 1 = 2.\nso  1 + 1 = 2.\n\n...\nDone.") == ["So 1 + 1 = 2.", "Done."]


def test_a_step_is_judged_by_what_is_new_in_it():
    steps = ["1 + 1 = 2", "nothing", "again 1+1 = 2", "1 + 1 = 2 and 2 + 2 = 5", "2 + 2 = 5", "3 + 3 = 6"]
    assert judge_arithmetic(steps) == [True, None, None, False, None, True]


@pytest.mark.parametrize(
    ("response", "quality"),
    [
        ("3 + 4 = 7\n7 * 2 = 14\n14 - 1 = 12\nThe answer is 12.", 2 / 3),
        ("<think>\n3 + 4 = 8\n</think>\n3 + 4 = 7", 1 / 2),
        ("Step 1: 3 + 4 = 7, 1 + 1 = 3\nStep 2: 7 * 2 = 14", 1 / 2),
        ("The answer is 12.", 0.0),
        ("", 0.0),
        ("x + 2 = 5, so x = 3", 0.0),
        ("1 + 1 = 2\n" * 1000 + "2 + 3 = 6", 1 / 2),  # the same again adds nothing
        ("5 = 5\n7 = 7\n2 + 2 = 2 + 2\n2 + 3 = 6", 0.0),
    ],
)
def test_the_share_of_valid_steps(response: str, quality: float):
    assert step_quality(PROMPT, response) == pytest.approx(quality)


class NoGuessing(StepScorer):
    """Half for a step that guesses, full marks for the others."""

    def score_steps(self, prompt: Prompt, steps: list[str]) -> list[float]:
        assert prompt is PROMPT
        return [0.5 if "guess" in step else 1.0 for step in steps]


def test_a_scorer_judges_every_step_and_arithmetic_stays_right():
    response = "I guess.\nI guess 1 + 1 = 3\nI guess 1 + 2 = 3\n2 + 2 = 4\nDone."
    assert step_quality(PROMPT, response) == pytest.approx(2 / 3)
    assert step_quality(PROMPT, response, NoGuessing()) == pytest.approx((0.5 + 0 + 0.5 + 1 + 1) / 5)
    assert step_quality(PROMPT, "\n", NoGuessing()) == 0.0


@pytest.mark.parametrize("scores", [[1.0], [1.0, 1.5], [float("nan"), 0.0]])
def test_a_scorer_gives_a_share_for_each_step(scores: list[float]):
    class Gives(StepScorer):
        def score_steps(self, prompt: Prompt, steps: list[str]) -> list[float]:
            return scores

    with pytest.raises(
        InputError, match=r"Gives.score_steps\(\) gave .* for 2 steps of a response to row 7 of 'sums'"
    ):
        step_quality(PROMPT, "a\nb", Gives())


HOSTILE = {
    "lines": "\n" * 10**6,
    "spaces": " " * 10**6,
    "digits": "9" * 10**6,
    "parentheses": "(" * 10_000 + ")" * 10_000 + " = 2",
    "relations": "=\n" * 500_000,
    "markers": "1. " * 300_000,
    "tags": "<think>" * 150_000,
    "backslashes": "\\" * 10**6,
    "distinct truths": "\n".join(f"{n} + 1 = {n + 1}" for n in range(60_000)),
    "long sides": ("-" * 3900 + "1 = 1 + 1.\n") * 250,
    "prose with relations": "the quick = brown fox. " * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_is_scored_in_seconds(name: str):
    start = time.perf_counter()
    assert 0 <= step_quality(PROMPT, HOSTILE[name]) <= 1
    assert time.perf_counter() - start < 10  # minutes, where the time grows with the square
