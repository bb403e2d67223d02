"""Which verifier counts for which response: by data set, by correctness and by how the response ended."""

import math
from typing import Any

import pytest
import torch
from toy_pipeline import Scored, Toy, fit, loader, rollouts_of, trainer_of

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.callbacks import ExactMatch, MathVerifier, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage
from sppo_lightning.routing import check_routes


def mixed(responses: list[str], sources: list[str | None], reasons: list[Any] | None = None) -> Rollouts:
    """Responses to rows of a data set "train", some of which name a source of their own."""
    made = rollouts_of(responses)
    made.prompts = [
        Prompt("2+3=", "5", "train", row, metadata={} if source is None else {"data_source": source})
        for row, source in enumerate(sources)
    ]
    made.finish_reasons = reasons or made.finish_reasons
    return made


def scored(rollouts: Rollouts, *verifiers: Verifier) -> Rollouts:
    batch = PromptBatch(rollouts.prompts, [], [])
    batch.rollouts = rollouts
    for verifier in verifiers:
        verifier.process(batch, trainer_of(), Toy())
    return rollouts


def nans(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def test_each_response_is_scored_by_the_verifiers_of_its_source():
    made = mixed(["0.5", "0.25", "1"], ["math", "code", None])
    seen: list[list[str]] = []

    class Sees(Scored):
        def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
            seen.append(responses)
            return super().score(prompts, responses)

    mathematics = Sees(name="m", applies_to=["math"])
    code = Sees(lambda _: 0.75, name="c", applies_to=["code"])
    scored(made, mathematics, code, Scored(lambda _: 0.0, name="rest", applies_to=["nobody"]))
    assert seen == [["0.5"], ["0.25"]]
    assert nans(made.rewards) == [0.5, 0.75, None]  # the third has no verifier at all
    assert nans(made.scores["m"].values) == [0.5, None, None]
    assert made.scores["m"].counts.tolist() == [True, False, False]


def test_the_name_of_the_data_set_covers_all_its_sources():
    made = scored(mixed(["1", "0"], ["math", None]), Scored(applies_to=["train"]))
    assert made.rewards.tolist() == [1.0, 0.0]


def test_weights_count_where_their_verifiers_do():
    made = scored(
        mixed(["1", "1"], ["a", "b"]),
        Scored(name="everywhere", weight=3.0),
        Scored(lambda _: 0.0, name="a_only", weight=1.0, applies_to=["a"]),
    )
    assert made.rewards.tolist() == [0.75, 1.0]


def test_a_gated_shaping_score_adds_nothing_to_what_is_wrong():
    made = scored(
        mixed(["1", "0", "0.5"], [None] * 3),
        Scored(name="right"),
        Scored(lambda _: 4.0, name="bonus", role="shaping", weight=0.5, only_if_correct=True),
    )
    assert made.correct.tolist() == [True, False, False]
    assert made.rewards.tolist() == [1.0, 0.0, 0.5]
    assert made.shaping.tolist() == [2.0, 0.0, 0.0]


def test_a_gated_outcome_is_0_where_the_others_are_not_full_marks():
    made = scored(
        mixed(["1", "0"], [None] * 2),
        Scored(name="right", weight=3.0),
        Scored(lambda _: 0.5, name="fast", only_if_correct=True),
        Scored(lambda _: 2.0, name="bonus", role="shaping", only_if_correct=True),
    )
    assert made.rewards.tolist() == [0.875, 0.0]
    assert made.shaping.tolist() == [2.0, 0.0]  # the gated outcome has no say in what is correct


def test_a_gated_score_asks_for_correct_responses_only():
    seen: list[str] = []
    scored(
        mixed(["1", "0", "1"], [None] * 3),
        Scored(name="right"),
        Scored(lambda text: float(bool(seen.append(text) or 1)), name="dear", only_if_correct=True),
    )
    assert seen == ["1", "1"]


def test_the_running_mean_is_of_what_counts():
    bonus = Scored(lambda _: 4.0, name="bonus", role="shaping", only_if_correct=True)
    _, trainer = fit(Scored(name="right"), bonus, batches=[["1", "0", "0", "1"], ["0", "1"]])
    assert bonus.state_dict() == {"total": 4.0 * 3, "number": 3.0}
    assert trainer.logged_metrics["reward/bonus"] == 4.0


def test_a_response_that_was_cut_off_is_unanswered():
    boxed = [r"\boxed{5}"] * 2
    reasons = ["stop", "length"]
    for verifier in (MathVerifier(), ExactMatch()):
        assert scored(mixed(boxed, [None] * 2, reasons), verifier).rewards.tolist() == [1.0, 0.0]
    for verifier in (MathVerifier(truncated="scored"), ExactMatch(truncated="scored")):
        assert scored(mixed(boxed, [None] * 2, reasons), verifier).rewards.tolist() == [1.0, 1.0]
    assert scored(mixed(["1", "1"], [None] * 2, reasons), Scored()).rewards.tolist() == [1.0, 1.0]
    shaping = scored(mixed(["1", "1"], [None] * 2, reasons), Scored(role="shaping", truncated="unanswered"))
    assert shaping.shaping.tolist() == [1.0, 0.0]
    assert shaping.scores["scored"].counts.tolist() == [True, False]


def test_rows_and_parts_keep_what_counts():
    made = scored(mixed(["1", "0", "1"], ["a", "b", "a"]), Scored(applies_to=["a"]))
    picked = made.rows([1, 2])
    assert picked.scores["scored"].counts.tolist() == [False, True]
    joined = Rollouts.concat([picked, made.rows([0])], [0, 1, 2])
    assert joined.scores["scored"].counts.tolist() == [False, True, True]
    assert nans(joined.rewards) == [None, 1.0, 1.0]


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (
            [Scored(role="shaping", name="bonus", only_if_correct=True), Scored(name="right")],
            "move Scored above Scored",
        ),
        (
            [Scored(name="a"), Scored(role="shaping", name="bonus", only_if_correct=True), Scored(name="right")],
            "'bonus', which asks whether a response is correct, before 'right'",
        ),
    ],
)
def test_a_gate_comes_after_what_judges(callbacks: list[Stage], words: str):
    with pytest.raises(InputError, match=words):
        fit(*callbacks, batches=[["1"]])


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"`Scored.applies_to`=\[\] names no data set"):
        Scored(applies_to=[])
    with pytest.raises(InputError, match="`Scored.truncated`=zero is unknown; use scored or unanswered"):
        Scored(truncated="zero")


class Holds:
    """The prompts of a data module."""

    def __init__(self, *sources: str | None) -> None:
        self.rollouts = mixed(["1"] * len(sources), list(sources))

    def prompts(self) -> list[Prompt]:
        return self.rollouts.prompts


@pytest.mark.parametrize(
    ("sources", "routes", "words"),
    [
        (
            ["math", "code"],
            ["mth", "code"],
            "`applies_to` of 'v0' names 'mth', the nearest is math; the data sets of this run are code, math, train.",
        ),
        (
            ["math", "code"],
            ["code"],
            r"No verifier of the role outcome applies to the data set math / train \(row 0\)",
        ),
    ],
)
def test_routes_are_checked_against_the_data(sources: list[str], routes: list[str], words: str):
    verifiers = [Scored(name=f"v{i}", applies_to=[route]) for i, route in enumerate(routes)]
    with pytest.raises(InputError, match=words):
        check_routes(verifiers, Holds(*sources), "fit")


def test_validation_need_not_have_the_sets_of_training():
    check_routes([Scored(applies_to=["math", "elsewhere"])], Holds("math"), "validate")
    check_routes([Scored(applies_to=["elsewhere"])], Holds("math"), "predict")
    check_routes([Scored()], Holds("math"), "fit")
    check_routes([Scored(applies_to=["elsewhere"])], loader(["1"]), "fit")
