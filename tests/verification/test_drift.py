import json
from collections.abc import Sequence

import pytest

from sppo_lightning.errors import InputError
from sppo_lightning.verification.drift import Limits, Series, alarms


def series_of(values: Sequence[float], window: int = 2) -> Series:
    made = Series(window)
    for value in values:
        made.add(value, 1)
    return made


def test_a_series_knows_its_first_last_and_lowest_window():
    made = Series(2)
    made.add(6.0, 2)
    assert (made.recent, made.first, made.lowest) == (None, None, None)
    made.add(0.0, 0)  # nobody was observed
    assert made.recent is None
    made.add(1.0, 6)
    assert made.recent == made.first == made.lowest == 7 / 8
    made.add(5.0, 4)
    assert (made.recent, made.first, made.lowest) == (6 / 10, 7 / 8, 6 / 10)
    made.add(9.0, 1)
    assert (made.recent, made.first, made.lowest) == (14 / 5, 7 / 8, 6 / 10)


def test_a_series_goes_on_from_its_state():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for cut in range(len(values)):
        resumed = Series(2)
        resumed.load_state_dict(json.loads(json.dumps(series_of(values[:cut]).state_dict())))
        for value in values[cut:]:
            resumed.add(value, 1)
        assert vars(resumed) == vars(series_of(values))


# what it begins with, how far it may go, and the first that is too far
CASES = [
    ("response_tokens", [100.0, 100.0], [41.0, 41.0], [39.0, 39.0]),
    ("distinct_responses", [0.8, 0.8], [0.41, 0.41], [0.39, 0.39]),
    ("repeated_ngrams", [0.1, 0.1], [0.29, 0.29], [0.31, 0.31]),
    ("without_reasoning", [0.2, 0.0], [0.29, 0.29], [0.31, 0.31]),
    ("candidate_spam", [0.0, 0.0], [0.09, 0.09], [0.11, 0.11]),
    ("grader/gap", [0.3, 0.3, 0.1, 0.1], [0.19, 0.19], [0.21, 0.21]),  # above 0.1, the smallest
    ("math/train_minus_held_out", [-0.1, -0.1], [0.04, 0.04], [0.06, 0.06]),
]


@pytest.mark.parametrize(("name", "first", "fair", "foul"), CASES, ids=[case[0] for case in CASES])
def test_each_alarm_has_its_limit(name: str, first: list[float], fair: list[float], foul: list[float]):
    limits = Limits()
    assert list(alarms({name: series_of(first)}, limits)) == []
    assert list(alarms({name: series_of([*first, *fair])}, limits)) == []
    (alarm,) = alarms({name: series_of([*first, *foul])}, limits)
    assert alarm.figure == name
    off = Limits(**dict.fromkeys(vars(limits)))
    assert list(alarms({name: series_of([*first, *foul])}, off)) == []


def test_one_outlier_is_no_trend():
    assert list(alarms({"response_tokens": series_of([100.0, 100.0, 1.0])}, Limits())) == []
    assert len(list(alarms({"response_tokens": series_of([100.0, 100.0, 1.0, 1.0])}, Limits()))) == 1


@pytest.mark.parametrize(("count", "alarm"), [(32, False), (64, True)])
def test_a_rise_that_few_responses_may_have_by_chance_is_no_alarm(count: int, alarm: bool):
    # the standard error of a share of a half is 0.5/√count, so four of them are 0.35 and 0.25 of the rise by 0.3
    made = Series(1)
    made.add(0.2 * count, count, 0.2 * count)
    made.add(0.5 * count, count, 0.5 * count)
    assert made.error == pytest.approx(0.5 / count**0.5)
    assert bool(list(alarms({"x/gap": made}, Limits()))) is alarm


def test_what_was_so_from_the_start_is_no_alarm():
    low = {name: series_of([0.01] * 9) for name in ("response_tokens", "distinct_responses")}
    high = {
        name: series_of([1.0] * 9) for name in ("repeated_ngrams", "without_reasoning", "candidate_spam", "x/gap")
    }
    assert list(alarms(low | high, Limits())) == []


def test_figures_without_a_limit_are_passed_over():
    assert list(alarms({"math/train": series_of([1.0, 1.0, 0.0, 0.0])}, Limits())) == []


def test_an_alarm_is_told_in_words():
    (fall,) = alarms({"response_tokens": series_of([100.0, 100.0, 30.0, 20.0])}, Limits())
    assert fall.sentence == (
        "`hacking/response_tokens` has a recent mean of 25, below 40, where `limits.length_share`=0.4 puts the limit "
        "from 100 in the first iterations: responses get short, so see whether they still give reasons"
    )
    (rise,) = alarms({"tests/gap": series_of([0.1, 0.1, 0.3, 0.3])}, Limits())
    assert rise.sentence == (
        "`hacking/tests/gap` has a recent mean of 0.3, above 0.2, where `limits.gap_growth`=0.1 puts the limit from "
        "0.1 at its lowest: the reward rises where this check does not, so see what they disagree on"
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("gap_growth", 0.0, "above 0"),
        ("length_share", 1.5, "above 0 and at most 1"),
        ("spam_growth", -1, "above 0"),
    ],
)
def test_a_limit_that_always_alarms_is_refused(name: str, value: float, allowed: str):
    with pytest.raises(InputError) as raised:
        Limits(**{name: value})
    assert str(raised.value) == (
        f"`HackingMonitor.limits.{name}`={value} would alarm without a cause; use a number {allowed}, or null for no "
        "alarm."
    )
