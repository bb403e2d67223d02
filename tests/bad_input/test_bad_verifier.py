from collections.abc import Callable
from typing import Any

import pytest
from tiny_config import ROLLOUT

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import Verifier


class OneForAll(Verifier):
    """Gives one score to a whole batch."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [1.0]


class Gives(Verifier):
    """Gives every response the same score."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [self.value] * len(responses)


def gives(value: float) -> dict[str, Any]:
    return {"class_path": f"{__name__}.Gives", "init_args": {"value": value}}


OF_A_VERIFIER = {
    "one for all": (
        {"class_path": f"{__name__}.OneForAll"},
        "Verifier 'one_for_all' returned 1 scores for 4 responses; return one for each, `None` for no verdict.",
    ),
    "above 1": (
        gives(1.5),
        "Verifier 'gives' gave 1.5 to a response to row 0 of 'train'; return a number in [0, 1], or set `role: shaping`, or "
        "`None` for no verdict.",
    ),
    "below 0": (
        gives(-0.5),
        "Verifier 'gives' gave -0.5 to a response to row 0 of 'train'; return a number in [0, 1], or set `role: shaping`, or "
        "`None` for no verdict.",
    ),
    "NaN": (
        gives(float("nan")),
        "Verifier 'gives' gave nan to a response to row 0 of 'train'; return a number in [0, 1] or `None` for no verdict.",
    ),
}


@pytest.mark.parametrize("case", OF_A_VERIFIER)
def test_a_verifiers_scores(refused: Callable[..., str], case: str):
    verifier, sentence = OF_A_VERIFIER[case]
    assert refused({"trainer.callbacks": [ROLLOUT, verifier]}) == sentence
