"""The embedded task."""

import re

import pytest

from sppo_lightning.data import ChainTask
from sppo_lightning.errors import InputError


def replay(prompt: str, solution: str) -> tuple[str, list[str]]:
    """The right last value of a prompt, and the steps of a solution whose value is not the one before plus the operand."""
    value, *words = prompt.removesuffix(" ;").split()
    steps = re.findall(r"(\w) (\d) (\+\d) = (\d)", solution)
    wrong = [" ".join(step) for step in steps if (int(step[1]) + int(step[2])) % 10 != int(step[3])]
    assert [word for step in steps for word in (step[0], step[2])] == words  # every label and operation, in order
    return str((int(value) + sum(map(int, words[1::2]))) % 10), wrong


def test_a_worked_solution_takes_every_step_and_comes_to_the_answer():
    for row in ChainTask({"2-10": 1.0}, size=50, demonstrations=True).rows():
        assert replay(row["prompt"], row["demonstration"]) == (row["answer"], [])
        assert row["demonstration"].endswith(f"; \\boxed{{ {row['answer']} }}")
        assert 2 <= row["operations"] <= 10


def test_slips_are_in_the_demonstration_and_never_in_the_answer():
    rows = ChainTask({"2-6": 1.0}, size=200, demonstrations=True, slips={3: 0.6}).rows()
    right, wrong = zip(*[replay(row["prompt"], row["demonstration"]) for row in rows], strict=True)
    assert list(right) == [row["answer"] for row in rows]
    assert all(" +3 " in step for steps in wrong for step in steps)
    threes = sum(row["prompt"].count("+3") for row in rows)
    assert sum(map(len, wrong)) / threes == pytest.approx(0.6, abs=0.1)


def test_the_whole_solution_as_the_answer_has_no_slips():
    settings = {"operations": {"2-6": 1.0}, "size": 50, "demonstrations": True, "seed": 4}
    whole = ChainTask(**settings, answer="solution", slips={3: 1.0}).rows()
    flawless = ChainTask(**settings, slips={3: 0.0}).rows()
    assert [row["prompt"] for row in whole] == [row["prompt"] for row in flawless]
    assert [row["answer"] for row in whole] == [row["demonstration"] for row in flawless]
    assert any(row["demonstration"] != row["answer"] for row in whole)


def test_splits_share_no_prompt_and_a_seed_draws_the_same():
    train, held_out = (ChainTask({"1-2": 1.0}, size=60, split=split).rows() for split in ("train", "validation"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert train == ChainTask({"1-2": 1.0}, size=60).rows()
    assert all(row["demonstration"] is None for row in train)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operations": {"5-2": 1}}, "it must lie within 1-20"),
        ({"operations": {"two": 1}}, "write a range such as 2-5"),
        ({"operations": {}}, "has no prompts to draw"),
        ({"max_operand": 10}, "is no digit; use 1 to 9"),
        ({"slips": {3: 1.5}}, "holds what is no chance"),
    ],
)
def test_settings_without_a_task_are_refused(settings: dict, said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        ChainTask(**{"operations": {"2-5": 1.0}, "size": 8} | settings)


def test_more_prompts_than_there_are():
    with pytest.raises(InputError, match="found only"):
        ChainTask({"1": 1.0}, size=300, max_operand=1).rows()
