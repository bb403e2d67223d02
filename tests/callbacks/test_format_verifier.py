from typing import Any

import pytest
from toy_pipeline import Scored, fit

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import FormatVerifier
from sppo_lightning.errors import InputError


def test_the_form_is_a_shaping_score_and_logged():
    form = FormatVerifier(require=[r"\d"], forbid=["!"], weight=0.5)
    module, trainer = fit(Scored(lambda _: 1.0), form, batches=[["5", "five", "5!", "4"], ["5"]])
    first, second = (batch.rollouts for batch in module.seen)
    assert first is not None
    assert second is not None
    assert first.scores["format_verifier"].values.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert first.rewards.tolist() == [1.0] * 4
    assert second.shaping.tolist() == [0.25]  # half of 1, less the first batch's mean of a half
    assert trainer.logged_metrics["reward/format_verifier"] == 1.0


def test_a_prompt_that_opens_the_thought_needs_no_second_one():
    form = FormatVerifier(think=True)
    prompts = [Prompt(text, "5", "sums", 0) for text in ("2+3", "2+3<think>\n") for _ in range(2)]
    responses = ["<think>so</think>5", "so</think>5"] * 2
    assert form.score(prompts, responses) == [1.0, 0.0, 0.0, 1.0]


def test_a_search_without_end_scores_0_and_is_counted():
    form = FormatVerifier(forbid=[r"(a+)+$"], timeout_seconds=0.05, max_failure_rate=0.0)
    module, trainer = fit(Scored(lambda _: 1.0), form, batches=[["a" * 5000 + "!", "b"]])
    rollouts = module.seen[0].rollouts
    assert rollouts is not None
    assert rollouts.scores["format_verifier"].values.tolist() == [0.0, 1.0]
    assert trainer.logged_metrics["verifier/format_verifier/timeouts"] == 1
    assert trainer.logged_metrics["verifier/format_verifier/errors"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "asks for nothing; set `require`, `forbid` or `think`"),
        ({"require": ["a("]}, r"`FormatVerifier.require`='a\(' is no regular expression \(missing \)"),
        ({"forbid": ["*"]}, r"`FormatVerifier.forbid`='\*' is no regular expression \(nothing to repeat"),
        ({"require": "ab"}, r"`FormatVerifier.require`='ab' is no list; use \['ab'\]"),
        ({"think": True, "timeout_seconds": 0.0}, "`FormatVerifier.timeout_seconds`=0.0 is no time"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        FormatVerifier(**settings)
