import time

import pytest

from sppo_lightning.verification.formats import MAX_CHARACTERS, ResponseFormat, is_opened, thinks_first


@pytest.mark.parametrize(
    ("response", "plain", "opened"),
    [
        ("<think>2+3 is 5</think>5", True, False),  # under an opened prompt it opens a second block
        ("\n <think>\nso\n</think>\n\n5\n", True, False),
        ("so</think>5", False, True),
        ("\nso\n</think>\n5", False, True),
        ("<think></think>5", False, False),
        ("<think> \n </think>5", False, False),
        ("<think>so</think>", False, False),
        ("<think>so</think> \n", False, False),
        (" </think>5", False, False),
        ("so</think>", False, False),
        ("<think>so", False, False),
        ("so", False, False),
        ("", False, False),
        ("first <think>so</think>5", False, False),
        ("<think>a</think><think>b</think>5", False, False),
        ("<think><think>a</think></think>5", False, False),
        ("<think>a</think>5</think>", False, False),
        ("a</think>5<think>", False, False),
    ],
)
def test_one_block_of_thought_and_an_answer(response: str, plain: bool, opened: bool):
    assert (thinks_first(response), thinks_first(response, opened=True)) == (plain, opened)
    form = ResponseFormat(think=True)
    assert (form.check(response), form.check(response, opened=True)) == tuple(
        "met" if good else "broken" for good in (plain, opened)
    )


def test_a_prompt_that_opens_the_block():
    assert is_opened("<|user|>2+3<|assistant|><think>\n")
    assert not is_opened("Think inside <think> tags.")


@pytest.mark.parametrize(
    ("require", "forbid", "response", "status"),
    [
        ([r"\\boxed\{\d+\}\s*\Z"], [], r"So \boxed{5}" + "\n", "met"),
        ([r"\\boxed\{\d+\}\s*\Z"], [], r"So \boxed{5}, I think", "broken"),
        (["a", "b"], [], "b a", "met"),
        (["a", "b"], [], "a", "broken"),
        ([], ["sorry", "(?i)as an ai"], "5", "met"),
        ([], ["sorry", "(?i)as an ai"], "As an AI, 5", "broken"),
        (["5"], ["5"], "5", "broken"),
    ],
)
def test_what_must_match_and_what_must_not(require: list[str], forbid: list[str], response: str, status: str):
    assert ResponseFormat(require, forbid).check(response) == status


@pytest.mark.parametrize("kind", ["require", "forbid"])
@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(\w+\s?)*$", r"(.*a){20}$"])
def test_a_search_that_would_never_end_is_no_form(kind: str, pattern: str):
    form = ResponseFormat(**{kind: [pattern]})
    start = time.perf_counter()
    assert form.check("a" * 50_000 + "!", timeout_seconds=0.1) == "timeout"
    assert time.perf_counter() - start < 10  # or for ever


def test_the_patterns_share_their_time():
    form = ResponseFormat(forbid=["(a+)+$"] * 50)
    start = time.perf_counter()
    assert form.check("a" * 5000 + "!", timeout_seconds=0.1) == "timeout"
    assert time.perf_counter() - start < 3  # 5 where each has its own


def test_what_is_too_long_to_read_is_broken():
    form = ResponseFormat(forbid=["b"])
    assert form.check("a" * MAX_CHARACTERS, timeout_seconds=5.0) == "met"
    assert form.check("a" * (MAX_CHARACTERS + 1), timeout_seconds=5.0) == "broken"


def test_what_is_no_regular_expression():
    with pytest.raises(ValueError, match="require") as raised:
        ResponseFormat(require=["a", "(b"])
    assert raised.value.args[:2] == ("require", "(b")
