import logging
import math
from typing import Any

import pytest
import torch

from sppo_lightning.errors import InputError
from sppo_lightning.warmup import CriticWarmup

GOOD = {"critic/brier_skill": torch.tensor(0.25), "critic/auroc": torch.tensor(0.75)}


def waits(warmup: CriticWarmup, *iterations: tuple[int, dict[str, Any]]) -> list[bool]:
    """Whether the policy is held still in the first iteration, and after each of those given."""
    held = [warmup.running]
    for updates, metrics in iterations:
        warmup.observe(updates, metrics)
        held.append(warmup.running)
    return held


def skill(value: float) -> dict[str, Any]:
    return {"critic/brier_skill": torch.tensor(value)}


def auroc(value: float) -> dict[str, Any]:
    return {"critic/auroc": torch.tensor(value)}


def test_nothing_asked_is_no_wait():
    assert waits(CriticWarmup()) == [False]


def test_a_number_of_updates():
    # two updates per iteration; an iteration is not interrupted
    assert waits(CriticWarmup(updates=5), (2, {}), (4, {}), (6, {}), (8, {})) == [True, True, True, False, False]
    assert waits(CriticWarmup(updates=4), (2, {}), (4, {})) == [True, True, False]


def test_a_skill():
    seen = [(1, skill(-2.0)), (2, skill(0.0625)), (3, skill(0.125)), (4, skill(-1.0))]
    assert waits(CriticWarmup(min_brier_skill=0.125), *seen) == [True, True, True, False, False]  # and stays open
    assert waits(CriticWarmup(min_brier_skill=-3.0), *seen[:1]) == [True, False]


def test_an_auroc():
    seen = [(1, auroc(0.5)), (2, auroc(0.625)), (3, auroc(0.25))]
    assert waits(CriticWarmup(min_auroc=0.625), *seen) == [True, True, False, False]
    assert waits(CriticWarmup(min_auroc=1.0), (1, auroc(0.875)), (2, auroc(1.0))) == [True, True, False]


def test_every_condition_must_hold_at_once():
    warmup = CriticWarmup(updates=2, min_brier_skill=0.125, min_auroc=0.625)
    seen = [
        (1, GOOD),  # too early
        (2, skill(0.25) | auroc(0.5)),
        (3, skill(0.0) | auroc(0.75)),
        (4, GOOD),
    ]
    assert waits(warmup, *seen) == [True, True, True, True, False]


@pytest.mark.parametrize("unknown", [{}, skill(math.nan), auroc(0.875)])
def test_a_skill_that_is_not_known_is_not_reached(unknown: dict[str, Any]):
    # as where all of an iteration's responses have the same reward
    assert waits(CriticWarmup(min_brier_skill=-9.0), (1, unknown), (2, skill(0.0))) == [True, True, False]


def test_the_wait_is_bounded():
    warmup = CriticWarmup(min_brier_skill=0.5, max_updates=3)
    assert waits(warmup, (2, skill(0.0)), (4, skill(0.0))) == [True, True, False]
    assert waits(CriticWarmup(min_auroc=0.75), (199, {}), (200, {})) == [True, True, False]
    assert waits(CriticWarmup(updates=3, min_auroc=0.75, max_updates=3), (2, GOOD), (3, {})) == [True, True, False]
    assert waits(CriticWarmup(min_auroc=0.75, max_updates=0)) == [False]


def test_a_resumed_run_goes_on_where_it_was():
    settings: dict[str, Any] = {"updates": 2, "min_brier_skill": 0.125}
    first = CriticWarmup(**settings)
    assert waits(first, (2, skill(0.0))) == [True, True]
    resumed = CriticWarmup(**settings)
    resumed.load_state_dict(first.state_dict())
    assert waits(resumed, (3, skill(0.25))) == [True, False]
    # and what is over does not begin again, however bad the critic has become
    again = CriticWarmup(**settings)
    again.load_state_dict(resumed.state_dict())
    assert waits(again, (4, skill(-1.0))) == [False, False]


def test_the_end_is_said_once(caplog: pytest.LogCaptureFixture):
    warmup = CriticWarmup(updates=2)
    with caplog.at_level(logging.INFO):
        waits(warmup, (1, GOOD), (2, GOOD), (3, GOOD))
    assert [record.getMessage() for record in caplog.records] == [
        "The critic has warmed up for 2 updates ({'critic/brier_skill': 0.25, 'critic/auroc': 0.75}); the policy "
        "moves from now on."
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"updates": -1},
            "`CriticWarmup.updates`=-1 and `max_updates`=200 leave no wait to make; use 0 or more, and no less for "
            "`max_updates`.",
        ),
        (
            {"updates": 300},
            "`CriticWarmup.updates`=300 and `max_updates`=200 leave no wait to make; use 0 or more, and no less for "
            "`max_updates`.",
        ),
        (
            {"min_brier_skill": 1.0},
            "`CriticWarmup.min_brier_skill`=1.0 is never reached; use less than 1, such as 0.05.",
        ),
        (
            {"min_brier_skill": math.nan},
            "`CriticWarmup.min_brier_skill`=nan is never reached; use less than 1, such as 0.05.",
        ),
        ({"min_auroc": 1.5}, "`CriticWarmup.min_auroc`=1.5 is no share; use 0 to 1, such as 0.6."),
        ({"min_auroc": -0.5}, "`CriticWarmup.min_auroc`=-0.5 is no share; use 0 to 1, such as 0.6."),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], sentence: str):
    with pytest.raises(InputError) as raised:
        CriticWarmup(**settings)
    assert str(raised.value) == sentence
