"""Stages from easy to hard."""

from typing import Any

import numpy as np
import pytest
from curricula import bound, observe, prompts

from sppo_lightning.batch import Prompt
from sppo_lightning.data import StagedCurriculum
from sppo_lightning.errors import InputError

LEVELS = [3, 1, 2, 1, 3, 2, 1, 2.0, "3", 1]


def staged(levels: list[Any] = LEVELS, batch_size: int = 2, **settings: Any) -> StagedCurriculum:
    curriculum = StagedCurriculum("level", **{"stages": 3} | settings)
    curriculum.bind(prompts([{"level": level, "topic": "x"} for level in levels]), batch_size, 3, True)
    return curriculum


def test_prompts_of_one_difficulty_stay_together():
    assert staged().stage_of.tolist() == [2, 0, 1, 0, 2, 1, 0, 1, 2, 0]
    assert staged(list(range(7, -1, -1)), stages=4).stage_of.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]


def test_stages_by_their_greatest_difficulties():
    assert staged(stages=[1, 2]).stage_of.tolist() == [2, 0, 1, 0, 2, 1, 0, 1, 2, 0]
    assert staged(stages=[2.5]).stage_of.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    curriculum = staged(stages=[1, 2], min_iterations=1)
    for row in (1, 2, 0):
        observe(curriculum, (row, 1.0))
    assert curriculum.stage == 2
    with pytest.raises(InputError, match=r"`StagedCurriculum.stages`=\[2, 1\] must rise"):
        staged(stages=[2, 1])
    with pytest.raises(InputError, match="gives stages of 0, 10 prompts"):
        staged(stages=[0.5])


def test_without_a_column_the_length_decides():
    curriculum = StagedCurriculum(stages=2)
    curriculum.bind([Prompt("x" * n, "", "train", n) for n in (5, 1, 9, 3)], 2, 3, True)
    assert curriculum.stage_of.tolist() == [1, 0, 1, 0]
    assert curriculum.describe(np.array([0, 1, 3]))["difficulty"] == 3.0


def test_earlier_stages_keep_a_share_and_later_ones_wait():
    curriculum = staged(earlier_share=0.3, ramp_iterations=0)
    assert curriculum.probabilities() == pytest.approx([0, 1 / 4, 0, 1 / 4, 0, 0, 1 / 4, 0, 0, 1 / 4])
    assert all(set(curriculum.draw(2, 0, batch)) <= {1, 3, 6, 9} for batch in range(50))
    curriculum.stage = 2
    own, earlier = 0.7 / 3, 0.3 / 7
    expected = [own, *[earlier] * 3, own, *[earlier] * 3, own, earlier]
    assert curriculum.probabilities() == pytest.approx(expected)


def test_a_new_stage_comes_by_and_by():
    curriculum = staged(earlier_share=0.2, ramp_iterations=3, min_iterations=1, threshold=0.5)
    assert curriculum.probabilities()[[0, 1]] == pytest.approx([0, 1 / 4])  # the first has no stage before it
    observe(curriculum, (1, 1.0))
    shares = []
    for _ in range(5):
        shares.append(curriculum.probabilities()[curriculum.stage_of == 1].sum())
        observe(curriculum, (2, 0.0))
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_a_stage_advances_when_its_running_pass_rate_is_above_the_threshold():
    curriculum = staged(threshold=0.6, min_iterations=2, running_decay=0.5)
    observe(curriculum, (1, 1.0), (3, 1.0))  # all right, but one iteration is too few
    assert (curriculum.stage, curriculum.pass_rate) == (0, 1.0)
    observe(curriculum, (1, 0.0), (3, 0.0))  # (0.5 · 2) / (0.5 · 2 + 2)
    assert (curriculum.stage, curriculum.pass_rate) == (0, pytest.approx(1 / 3))
    observe(curriculum, (6, 1.0), (9, 1.0))  # (0.5 · 1 + 2) / (0.5 · 3 + 2) = 5/7
    assert (curriculum.stage, curriculum.pass_rate) == (1, 0.0)
    observe(curriculum, (2, 0.0), (1, 1.0), (3, 1.0))
    observe(curriculum, (1, 1.0), (3, 1.0))  # of the stage's own prompts, one of one is wrong
    assert (curriculum.stage, curriculum.pass_rate) == (1, 0.0)
    observe(curriculum, (2, 1.0), (5, 1.0))  # 2 / 2.25
    assert curriculum.stage == 2
    for _ in range(4):
        observe(curriculum, (0, 1.0))
    assert curriculum.stage == 2  # there is none behind the last
    assert curriculum.pass_rate == 1.0


def test_the_stages_are_described():
    curriculum = staged()
    observe(curriculum, (1, 1.0), (3, 0.0))
    expected = {"stage": 0.0, "stage_pass_rate": 0.5, "difficulty": 1.5}
    expected |= {"share_stage_0": 0.75, "share_stage_1": 0.0, "share_stage_2": 0.25}
    assert curriculum.describe(np.array([0, 1, 3, 6])) == expected
    assert curriculum.describe(np.array([], dtype=np.int64)) == {"stage": 0.0, "stage_pass_rate": 0.5}


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([1, 2, "hard"], "is hard in row 2 of train"),
        ([1, None, 2], "is missing in row 1 of train"),
        ([float("nan"), 1, 2], "is nan in row 0 of train"),
        ([[1], 1, 2], "is [1] in row 0 of train"),
    ],
)
def test_a_difficulty_that_is_no_number(levels: list[Any], words: str):
    with pytest.raises(InputError) as raised:
        staged(levels)
    assert str(raised.value) == (
        f"`StagedCurriculum.column`=level {words}, where a number must be; name a column of numbers."
    )


def test_a_column_that_is_not_there():
    with pytest.raises(InputError) as raised:
        StagedCurriculum("levle").bind(prompts([{"level": 1}]), 1, 3, True)
    assert str(raised.value) == (
        "`StagedCurriculum.column`=levle is missing in row 0 of train, where a number must be, the nearest is level; "
        "name a column of numbers."
    )


@pytest.mark.parametrize(("batch_size", "stages", "sizes"), [(5, 3, "4, 3, 3"), (2, 4, "4, 3, 3, 0")])
def test_stages_that_fill_no_batch(batch_size: int, stages: int, sizes: str):
    with pytest.raises(InputError) as raised:
        staged(batch_size=batch_size, stages=stages)
    assert str(raised.value) == (
        f"`StagedCurriculum.stages`={stages} gives stages of {sizes} prompts, and none may be empty, nor the first "
        f"too small for a batch of {batch_size}; use fewer stages."
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stages", 1, "leaves nothing to advance to; use 2 or more, or leave `data.curriculum` out."),
        (
            "threshold",
            1.0,
            "does not lie between 0 and 1; use the pass rate of a stage that is mastered, such as 0.7.",
        ),
        ("earlier_share", 0.0, "does not lie between 0 and 1; use the share of the stages before, such as 0.2."),
        ("running_decay", 1.5, "does not lie between 0 and 1; use what is left after an iteration, such as 0.9."),
        ("min_iterations", 0, "is not above 0; use 1 or more, such as 5."),
        ("ramp_iterations", -1, "is below 0; use 0 or more."),
    ],
)
def test_settings_that_cannot_be_used(name: str, value: float, words: str):
    with pytest.raises(InputError) as raised:
        StagedCurriculum(**{name: value})  # type: ignore[arg-type]
    assert str(raised.value) == f"`StagedCurriculum.{name}`={value} {words}"


def test_a_draw_fills_a_batch_in_every_stage():
    curriculum = bound(StagedCurriculum(stages=2), 12, batch_size=6)  # 10 texts of one character, 2 of two
    assert curriculum.stage_of.tolist() == [0] * 10 + [1] * 2
    curriculum.stage = 1
    assert len(set(curriculum.draw(6, 0, 0))) == 6
