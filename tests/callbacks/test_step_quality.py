from typing import Any

import pytest
from toy_pipeline import Scored, fit

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import StepQuality
from sppo_lightning.errors import InputError
from sppo_lightning.verification.steps import StepScorer

RIGHT = "3 + 4 = 7\nso 5"
HALF = "3 + 4 = 7\n3 + 5 = 9\nso 5"
NOTHING = "so 5"
WRONG = "3 + 4 = 7\nso 6"


def judge(response: str) -> float:
    return float(response.endswith("5"))


def scores(*settings: Any, **named: Any) -> Any:
    module, trainer = fit(Scored(judge), StepQuality(*settings, **named), batches=[[RIGHT, HALF, NOTHING, WRONG]])
    assert module.seen[0].rollouts is not None
    return module.seen[0].rollouts, trainer


def test_right_answers_by_nonsense_get_less_and_wrong_answers_nothing():
    rollouts, trainer = scores(weight=0.5)
    assert rollouts.shaping.tolist() == [0.5, 0.25, 0.0, 0.0]
    assert rollouts.rewards.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert trainer.logged_metrics["reward/step_quality"] == 0.5  # over the three that are correct


def test_without_the_gate_steps_count_for_wrong_answers_too():
    rollouts, _ = scores(only_if_correct=False)
    assert rollouts.shaping.tolist() == [1.0, 0.5, 0.0, 1.0]


class LastIsBest(StepScorer):
    """A step's place among all."""

    def score_steps(self, prompt: Prompt, steps: list[str]) -> list[float]:
        return [(i + 1) / len(steps) for i in range(len(steps))]


def test_a_learned_scorer_has_its_say():
    rollouts, _ = scores(LastIsBest())
    # (1/2 + 1) / 2, (1/3 + 0 + 1) / 3, 1
    assert rollouts.shaping.tolist() == pytest.approx([3 / 4, 4 / 9, 1.0, 0.0])


def test_it_comes_after_what_judges():
    with pytest.raises(InputError, match="move Scored above StepQuality"):
        fit(StepQuality(), Scored(), batches=[[RIGHT]])


def test_a_scorer_that_fails_gives_no_verdict():
    class Fails(LastIsBest):
        def score_steps(self, prompt: Prompt, steps: list[str]) -> list[float]:
            if "3 + 5 = 9" in steps:
                raise RuntimeError("out of memory")
            return super().score_steps(prompt, steps)

    rollouts, trainer = scores(Fails(), max_failure_rate=0.5)
    assert rollouts.shaping.isnan().tolist() == [False, True, False, False]
    assert trainer.logged_metrics["verifier/step_quality/errors"] == 1
