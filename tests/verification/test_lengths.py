import math

import pytest

from sppo_lightning.errors import InputError
from sppo_lightning.verification.lengths import Cosine, LengthCurve, Linear, Overlong


def along(curve: LengthCurve, lengths: list[int], correct: bool = False) -> list[float]:
    return [curve.value(tokens, 10, correct) for tokens in lengths]


@pytest.mark.parametrize(
    ("buffer_tokens", "penalties"),
    [
        (4, [0, 0, -0.25, -0.5, -0.75, -1, -1]),
        (10, [-0.1, -0.6, -0.7, -0.8, -0.9, -1, -1]),
        (0, [0, 0, 0, 0, 0, 0, -1]),
    ],
)
def test_equation_13_of_dapo(buffer_tokens: int, penalties: list[float]):
    assert along(Overlong(buffer_tokens), [1, 6, 7, 8, 9, 10, 11]) == pytest.approx(penalties, abs=1e-12)


@pytest.mark.parametrize("buffer_tokens", [11, -1])
def test_a_buffer_outside_the_response_is_refused(buffer_tokens: int):
    with pytest.raises(InputError) as raised:
        Overlong(buffer_tokens).check(10)
    assert str(raised.value) == (
        f"`Overlong.buffer_tokens`={buffer_tokens} is not within the 10 tokens of `max_response_tokens`; "
        "use a fifth of them."
    )


def test_linear():
    assert along(Linear(), [0, 1, 5, 10, 11]) == pytest.approx([0, -0.1, -0.5, -1, -1], abs=1e-12)


def test_cosine_with_the_papers_values():
    paper = Cosine(correct_short=2.0, correct_long=1.0, wrong_short=-10.0, wrong_long=0.0, exceeded=-10.0)
    # at a third of the way cos = 1/2, at one half 0: three quarters, then half of the short value's share
    third = [paper.value(tokens, 12, correct) for correct in (True, False) for tokens in (0, 4, 6, 8)]
    assert third == pytest.approx([2, 1.75, 1.5, 1.25, -10, -7.5, -5, -2.5])
    assert along(paper, [10, 11], correct=True) == along(paper, [10, 11]) == [-10, -10]


def test_cosine_pays_no_wrong_response_more_than_a_correct_one():
    curve = Cosine()
    for tokens in range(11):
        assert curve.value(tokens, 10, True) >= curve.value(tokens, 10, False)
    assert curve.value(5, 10, True) == pytest.approx(0.5)
    assert curve.value(5, 10, False) == pytest.approx(-0.5)
    assert along(curve, [10, 12], correct=True) == [-1, -1]


def test_cosine_refuses_what_is_no_number():
    with pytest.raises(InputError, match=r"`Cosine.wrong_long`=nan cannot be added to an advantage"):
        Cosine(wrong_long=math.nan)
