import inspect
import re
from typing import Any

import pytest

from sppo_lightning import SPPOModule, callbacks
from sppo_lightning.collapse import RULES, Collapse, CollapseLimits
from sppo_lightning.errors import InputError

ENTROPY, TOKENS, CUT_OFF = "policy/entropy", "rollout/response_tokens_mean", "rollout/truncated_fraction"
REWARD, CLIPPED, SKILL = "reward/mean", "policy/clip_fraction", "critic/brier_skill"


def told(metric: str, values: list[float], window: int = 2, **limits: float | None) -> list[tuple[int, str]]:
    """After which values, counted from 1, there is a sentence, and how it begins."""
    collapse = Collapse({metric: window}, CollapseLimits(**limits))
    found = [(i, sentence) for i, v in enumerate(values, 1) for sentence in collapse.observe({metric: v})]
    return [(i, sentence.split(":")[0]) for i, sentence in found]


def test_entropy_against_its_start_and_an_absolute_bound() -> None:
    hardly = "the policy hardly explores any more"
    # means of two: 1, 0.6, 0.2 (not below a fifth of 1), 0.15
    assert told(ENTROPY, [1.0, 1.0, 0.2, 0.2, 0.1]) == [(5, hardly)]
    assert told(ENTROPY, [0.06, 0.06, 0.02, 0.02, 0.01]) == [(5, hardly)]
    assert told(ENTROPY, [0.06, 0.06, 0.02, 0.02, 0.01], min_entropy=None) == []
    assert told(ENTROPY, [0.06, 0.06, 0.02, 0.02, 0.0], min_entropy=None) == [(5, hardly)]
    assert told(ENTROPY, [1.0, 1.0, 0.05, 0.03], entropy_share=None) == []
    assert told(ENTROPY, [0.01, 0.01]) == [(2, hardly)]
    assert told(ENTROPY, [0.0] * 9, min_entropy=None, entropy_share=None) == []


def test_lengths_against_their_start() -> None:
    assert told(TOKENS, [100.0, 100.0, 30.0, 30.0, 29.0]) == [(5, "responses have become short")]
    assert told(TOKENS, [100.0, 100.0, 400.0, 400.0, 401.0]) == [(5, "responses have become long")]
    assert told(TOKENS, [100.0, 100.0, 0.0, 0.0, 9999.0, 9999.0], length_share=None, length_growth=None) == []


def test_fractions() -> None:
    assert told(CUT_OFF, [0.5, 0.5, 0.52]) == [(3, "many responses are cut off")]
    assert told(CLIPPED, [0.4, 0.4, 0.42]) == [(3, "updates leave the clip range at once")]
    assert told(CUT_OFF, [1.0] * 4, truncated_fraction=None) == told(CLIPPED, [1.0] * 4, clip_fraction=None) == []


def test_rewards_without_a_difference() -> None:
    assert told(REWARD, [0.0, 0.0, 0.01, 0.0, 0.0, 0.0], window=3) == [(6, "there is nothing to learn from")]
    assert told(REWARD, [1.0, 0.99, 1.0, 1.0, 1.0], window=3) == [(5, "there is nothing left to learn")]
    assert told(REWARD, [0.0, 1.0, 0.0, 1.0]) == []
    # one after the other, without an end of the first that is told of
    assert [i for i, _ in told(REWARD, [0.0, 0.0, 1.0, 1.0])] == [2, 4]


def test_skill_is_asked_for_its_sign_alone() -> None:
    [(when, sentence)] = told(SKILL, [-0.1, 0.2, -0.1, -0.1, -0.1, -0.1, -9.0], window=5)
    assert (when, sentence) == (5, "the critic foresees less than the mean reward does")
    assert told(SKILL, [-99.0, 0.01, -0.1, 0.01, -0.1], window=5) == []
    assert told(SKILL, [0.04] * 5, window=5, brier_skill=0.05) == [(5, sentence)]
    assert told(SKILL, [-1.0] * 9, window=5, brier_skill=None) == []


def test_once_per_episode_and_an_episode_ends_with_a_whole_window_without() -> None:
    low, high = [0.0, 0.0], [1.0, 1.0]
    # means 1, 0.5, 0 ✗, 0.5, 1: two in a row without it
    assert [i for i, _ in told(ENTROPY, [*high, *low, *high, *low])] == [4, 8]
    # 0 ✗, 0.5, 0.5, 0 ✗: as long as the window, so it may come again
    assert [i for i, _ in told(ENTROPY, [*high, *low, 1.0, 0.0, 0.0])] == [4, 7]
    # 0 ✗, 0.3, 0.15 ✗, 0 ✗: an interruption
    assert [i for i, _ in told(ENTROPY, [*high, *low, 0.6, -0.3, 0.3])] == [4]
    assert [i for i, _ in told(ENTROPY, [*high, *low * 5])] == [4]


def test_what_is_missing_or_not_finite_says_nothing() -> None:
    nan, infinity = float("nan"), float("inf")
    collapse = Collapse({REWARD: 2, ENTROPY: 2}, CollapseLimits())
    rows: list[dict[str, float]] = [
        {REWARD: 0.0},
        {REWARD: nan},
        {},
        {ENTROPY: infinity},
        {ENTROPY: nan},
        {REWARD: 0.0},
    ]
    assert [len(collapse.observe(row)) for row in rows] == [0, 0, 0, 0, 0, 1]
    assert collapse.series[ENTROPY].entries == []


def test_the_sentence_has_numbers_causes_and_ways_out() -> None:
    collapse = Collapse({CUT_OFF: 2}, CollapseLimits())
    [sentence] = [s for value in (0.25, 0.25, 0.5, 0.75) for s in collapse.observe({CUT_OFF: value})]
    assert sentence == (
        "many responses are cut off: `rollout/truncated_fraction` has a mean of 0.625 over the last 2 iterations, from "
        "0.25 over the first 2. It often comes from `sampling.max_new_tokens` too small for the prompts, repetition, "
        "or a chat template without its end of sequence. Try a larger `sampling.max_new_tokens`, LengthPenalty with "
        "DAPO's overlong buffer, or `truncated: unanswered` of the verifiers."
    )


def test_the_ways_out_are_settings_and_callbacks_that_there_are() -> None:
    texts = " ".join(rule.ways_out for rule in RULES)
    settings = set(re.findall(r"`model\.(\w+)", texts))
    assert {"policy_optimizer", "kl_coef", "mini_batch_size", "critic_warmup"} <= settings
    assert settings <= set(inspect.signature(SPPOModule).parameters)
    names = set(re.findall(r"(SampleLog|LengthPenalty|HackingMonitor)", texts))
    assert names <= set(callbacks.__all__)


def test_a_state_goes_on() -> None:
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    whole = Collapse({ENTROPY: 2, REWARD: 3}, CollapseLimits())
    expected = [whole.observe({ENTROPY: v, REWARD: v}) for v in values]
    assert sum(map(len, expected)) == 5  # of entropy in 4, 7 and 13, of rewards in 8 and 11
    for cut in range(len(values)):
        first, second = (Collapse({ENTROPY: 2, REWARD: 3}, CollapseLimits()) for _ in range(2))
        for v in values[:cut]:
            first.observe({ENTROPY: v, REWARD: v})
        second.load_state_dict(first.state_dict())
        assert [second.observe({ENTROPY: v, REWARD: v}) for v in values[cut:]] == expected[cut:], cut
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"min_entropy": 0.0}, "above 0"),
        ({"entropy_share": 1.0}, "above 0 and below 1"),
        ({"length_growth": 1.0}, "above 1"),
        ({"truncated_fraction": float("nan")}, "above 0 and below 1"),
        ({"brier_skill": 1.0}, "below 1"),
    ],
)
def test_limits_that_cannot_be_meant(limits: dict[str, Any], allowed: str) -> None:
    [(name, value)] = limits.items()
    with pytest.raises(InputError) as raised:
        CollapseLimits(**limits)
    assert str(raised.value) == (
        f"`CollapseMonitor.limits.{name}`={value} would warn of nothing, or of everything; use a number {allowed}, or "
        "null for no warning."
    )
