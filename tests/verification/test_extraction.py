import time

import pytest

from sppo_lightning.verification.extraction import extract_answer, extract_boxed, find_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a + \boxed{b}}", r"a + \boxed{b}"),
        (r"an open { before \boxed{5}} and a closed } behind", "5"),
        (r"\boxed{5", None),
        (r"\boxed{4} and \boxed{5", None),
        (r"\boxed{{5}", None),
        (r"\boxed 5", None),
        (r"\boxedtext{5}", None),
        ("no box, 5", None),
        (r"\boxed{}", ""),
    ],
)
def test_extract_boxed(text: str, expected: str | None):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I do not know, 2?", None),
        (r"<think>\boxed{1}", None),  # it never finished thinking
        (r"#### 3" + "\n" + r"\boxed{4}", "4"),
        ("5\n#### 6\n#### 7 \nbye", "7"),
        ("#### **7**", "7"),
        ("#### Answer: 7", "7"),
        ("Answer: 8\n**Answer:** 9.\nbye", "9"),
        ("The final answer is $10$.", "$10$"),
        ("The final answer is **10**.", "10"),
        ("Final Answer: The final answer is $10$. I hope it is correct.", "$10$"),
        ("The answer is 42", None),  # no mark
        (r"#### 3" + "\n" + r"\boxed{4", None),
        ("11", None),
        (r"\boxed{}", None),
        (r"\boxed{5} in a \boxed{}", None),
        (r"\boxed{" + "1" * 512 + "}", "1" * 512),
        (r"\boxed{" + "1" * 513 + "}", None),
        ("", None),
    ],
)
def test_extract_answer(response: str, expected: str | None):
    assert extract_answer(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{1} or $\boxed{2}$", "1, 2"),
        (r"$\boxed{1}$, \boxed{2} and \boxed{3}.", "1, 2, 3"),
        (r"\boxed{1}" + "\n\n" + r"\boxed{1}", "1"),
        (r"\boxed{1} is half of it, so \boxed{2}", "2"),
        (r"\boxed{1}. Thus \boxed{2}, \boxed{3}", "2, 3"),
    ],
)
def test_boxes_side_by_side_are_one_answer(response: str, expected: str):
    assert extract_answer(response) == expected


@pytest.mark.parametrize(
    ("before", "answer", "behind"),
    [
        (r"<think>\boxed{1}</think> so \boxed{ ", "12", " }."),
        (r"<think>5</think> 5 or \boxed {", "5", "} 5"),
        (r"\boxed{4} no: \boxed{", r"1} or $\boxed{ 2", "}$"),
        (r"\boxed{", r"1} or \boxed{2} or \boxed{2", "}"),
        ("#### Answer:  **", "A", "**. Because A"),
        ("a\n#### ** ", "7", " **.\n7"),
        ("Answer: 8\nFinal Answer: The final answer is ", "$8$", ". I hope"),
    ],
)
def test_where_the_answer_stands(before: str, answer: str, behind: str):
    found = find_answer(before + answer + behind)
    assert found is not None
    assert (found.start, found.end) == (len(before), len(before + answer))
    assert found.text == extract_answer(before + answer + behind)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 15_000,
        r"\boxed{" + "{" * 100_000,
        r"\boxed{" * 5_000 + "1" + "}" * 5_000,
        r"\boxed{" + "1" * 100_000 + "}",
        r"\boxed{1} " * 20_000,
        r"\boxed{1}" + " " * 100_000 + r"\boxed{2}",
        r"\boxed" + " " * 100_000 + "{5}",
        "answer" + " " * 100_000,
        "Answer: 1 " * 10_000,
        "Answer: " + "1. " * 50_000,
        "\\" * 100_001 + "boxed{5}",
        "\ud800" * 100_000,
    ],
)
def test_extraction_is_linear(text: str):
    def seconds() -> float:
        start = time.thread_time()
        extract_answer(text)
        return time.thread_time() - start

    assert min(seconds() for _ in range(3)) < 0.5  # Python collects garbage when it likes
