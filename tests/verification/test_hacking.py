import time

import pytest

from sppo_lightning.verification.hacking import Reading, offers_several, read, reasoning_characters, repeated_share


@pytest.mark.parametrize(
    ("text", "words", "share"),
    [
        ("a b c d a b c d", 4, 1 / 5),  # abcd bcda cdab dabc abcd
        ("a a a a a", 4, 1 / 2),
        ("a b c d", 4, 0.0),
        ("a b c", 4, 0.0),  # no n-gram at all
        ("", 4, 0.0),
        ("yes\n yes  yes", 1, 2 / 3),
        ("to be or not to be", 2, 1 / 5),
    ],
)
def test_the_share_of_repeated_ngrams(text: str, words: int, share: float):
    assert repeated_share(text, words) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        (r"\boxed{42}", 0),
        (r"The final answer is $\boxed{42}$.", 0),
        ("#### 42", 0),
        ("Answer: 42", 0),
        ("<think></think>42", 2),
        (r"2 + 3 = 5, so \boxed{5}", 8),  # 2+3=5, and so
        (r"<think>six times seven</think>\boxed{42}", 13),
        ("42", 2),  # no mark says that this is an answer
        ("", 0),
        ("```python\nprint(1)\n```", 0),
        ("It prints 1.\n```python\nprint(1)\n```", 9),
    ],
)
def test_characters_beside_the_answer(text: str, characters: int):
    assert reasoning_characters(text) == characters


@pytest.mark.parametrize(
    ("response", "gold", "several"),
    [
        (r"\boxed{42} \boxed{43}", "42", True),
        (r"\boxed{42}, that is \boxed{ 42 }", "42", False),
        (r"<think>\boxed{41}? no</think>\boxed{42}", "42", False),
        (r"\boxed{\boxed{5}}", "5", False),
        (r"\boxed{\frac{1}{2}} or rather \fbox{0.5}", "1/2", True),
        (r"\boxed{42", "42", False),
        (r"\boxed{42 or 43}", "42", True),
        (r"\boxed{x=1\text{ or }x=2}", "x=1 or x=2", False),
        (r"\boxed{\text{for}}", "for", False),
        ("Answer: 42\nAnswer: 43", "42", True),
        ("**Answer:** 42\nAnswer: $\\boxed{42}$", "42", False),
        ("Answer: 42 or 43", "42", True),
        ("It is 42 or 43", "42", True),
        ("Take 42 or 43.\nI say 42.", "42", False),
        ("cats or dogs", "cats", False),
        ("", "", False),
    ],
)
def test_several_answers(response: str, gold: str, several: bool):
    assert offers_several(response, gold) is several


def test_reasons_are_given_in_words():
    assert Reading(0.75, 3, True).reasons(20) == [
        "offers several answers",
        "3 characters beside the answer",
        "75% of its n-grams are repeats",
    ]
    assert Reading(0.25, 20, False).reasons(20) == []


HOSTILE = [
    r"\boxed{" * 50_000,
    r"\boxed{" * 25_000 + "}" * 25_000,
    "{" * 200_000,
    "Answer: " * 40_000,
    "answer" + "*" * 200_000,
    "### " * 50_000,
    "``` " * 50_000,
    "```\n" * 50_000,
    "1 or " * 50_000,
    "a " * 100_000,
    "\x00\ud800\u202e" * 50_000,
    "\\" * 200_000,
    "</think>" * 20_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_takes_linear_time(text: str):
    start = time.process_time()
    read(text, text)
    assert time.process_time() - start < 2.0
