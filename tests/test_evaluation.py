import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, Rollouts, Scores
from sppo_lightning.evaluation import Evaluation, by_dataset, critic_metrics, pass_at_k, pearson, problem_id

NAN = math.nan


def scored(*rows: tuple[str, float]) -> Rollouts:
    """A response to each (question, reward)."""
    n = len(rows)
    made = Rollouts(
        prompts=[Prompt(question, "1", "sums", row) for row, (question, _) in enumerate(rows)],
        prompt_index=torch.arange(n),
        prompt_ids=torch.ones(n, 1, dtype=torch.long),
        prompt_mask=torch.ones(n, 1),
        response_ids=torch.ones(n, 1, dtype=torch.long),
        response_mask=torch.ones(n, 1),
        sampled_log_probs=torch.zeros(n, 1),
        responses=["x"] * n,
        finish_reasons=["stop"] * n,
        temperature=1.0,
        policy_version=0,
    )
    made.scores["table"] = Scores(torch.tensor([reward for _, reward in rows]), 1.0, "outcome")
    return made


def report(names: list[str], *updates: tuple[Any, ...]) -> dict[str, float]:
    evaluation = Evaluation()
    for update in updates:
        evaluation.update(*update)
    return evaluation.report(names)


def approx(metrics: dict[str, float]) -> Any:
    return pytest.approx(metrics, abs=1e-7)


def test_one_data_set_by_hand():
    rows = scored(("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0), ("c", 1.0), ("c", 1.0), ("d", 0.5), ("d", 1.0))
    assert report(["sums"], (0, rows, None)) == approx(
        {
            "val/sums/avg@2": (0.5 + 0 + 1 + 0.75) / 4,
            "val/sums/pass@2": 3 / 4,  # a, c and d have a response that is all right
        }
    )


def test_a_problem_stored_several_times_counts_once_with_all_its_responses():
    # "a" stands in three rows, of which one comes in a later batch, and "b" in one
    first, second = scored(("a", 1.0), ("b", 1.0), ("a", 0.0)), scored(("a", 0.0))
    metrics = report(["aime"], (0, first, None), (0, second, None))
    assert metrics == approx({"val/aime/avg@3": (1 / 3 + 1) / 2, "val/aime/pass@3": 1.0})


def test_the_same_question_with_another_gold_answer_is_another_problem():
    assert problem_id(Prompt("a", "1", "x", 0)) == problem_id(Prompt("a", "1", "y", 5))
    assert problem_id(Prompt("a", "1", "x", 0)) != problem_id(Prompt("a", "2", "x", 0))
    assert problem_id(Prompt("a1", "", "x", 0)) != problem_id(Prompt("a", "1", "x", 0))
    ids = torch.tensor([problem_id(Prompt(str(i), "", "x", i)) for i in range(1000)], dtype=torch.float64)
    assert ids.unique().numel() == 1000
    assert [int(x) for x in ids] == [problem_id(Prompt(str(i), "", "x", i)) for i in range(1000)]


def test_responses_without_a_verdict_are_left_out():
    rows = scored(("a", 1.0), ("a", NAN), ("b", 0.0), ("b", 1.0), ("c", NAN), ("c", NAN))
    assert report(["sums"], (0, rows, None)) == approx({"val/sums/avg@2": 0.75, "val/sums/pass@2": 1.0})


def test_several_data_sets_and_all_of_them():
    short = (0, scored(("a", 1.0), ("b", 1.0)), None)
    long = (1, scored(("c", 0.0), ("d", 1.0), ("e", 0.0), ("f", 0.0)), None)
    assert report(["short", "long"], short, long) == approx(
        {
            "val/short/avg@1": 1.0,
            "val/short/pass@1": 1.0,
            "val/long/avg@1": 0.25,
            "val/long/pass@1": 0.25,
            "val/all/avg@1": 0.5,
            "val/all/pass@1": 0.5,
        }
    )


def test_greedy_responses_are_kept_apart():
    sampled, greedy = scored(("a", 0.0), ("a", 1.0)), scored(("a", 1.0))
    metrics = report(["sums"], (0, sampled, None), (0, greedy, None, True))
    assert metrics == approx({"val/sums/avg@2": 0.5, "val/sums/pass@2": 1.0, "val/sums/greedy": 1.0})


def test_the_critics_values_meet_the_pass_rates_problem_by_problem():
    rows = scored(("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 0.0), ("c", 1.0), ("c", 1.0))
    values = torch.tensor([0.6, 0.6, 0.2, 0.2, 0.7, 0.7])
    metrics = report(["sums"], (0, rows, values))
    # rates (0.5, 0, 1) about 0.5 and values (0.6, 0.2, 0.7) about 0.5: 0.25 / sqrt(0.5 · 0.14)
    assert metrics["val/sums/critic_pearson"] == pytest.approx(0.25 / math.sqrt(0.5 * 0.14))
    assert metrics["val/sums/value_mean"] == pytest.approx(0.5)


def test_nothing_to_report():
    assert report([]) == {}
    assert report(["sums", "products"]) == {}
    assert report(["sums"], (0, scored(("a", NAN)), None)) == {}


def test_a_second_epoch_starts_anew():
    evaluation = Evaluation()
    evaluation.update(0, scored(("a", 0.0)), None)
    assert evaluation.report(["sums"])["val/sums/avg@1"] == 0.0
    evaluation.reset()
    evaluation.update(0, scored(("a", 1.0)), None)
    assert evaluation.report(["sums"])["val/sums/avg@1"] == 1.0


@pytest.mark.parametrize(
    ("rewards", "k", "expected"),
    [
        ([1.0, 0.0, 0.0, 0.0], 1, 1 / 4),
        ([1.0, 0.0, 0.0, 0.0], 2, 1 - (3 * 2) / (4 * 3)),
        ([1.0, 1.0, 0.0, 0.0], 2, 1 - 1 / 6),
        ([1.0, 1.0, 0.0, 0.0], 3, 1.0),  # no three of them fail
        ([0.0, 0.99], 2, 0.0),  # a part is no success
        ([1.0], 16, 1.0),  # fewer responses than k: what is there
        ([0.0, 0.0], 16, 0.0),
    ],
)
def test_pass_at_k(rewards: list[float], k: int, expected: float):
    assert pass_at_k(torch.tensor(rewards), k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),
        ([0.3, 0.3, 0.3], [1.0, 0.0, 1.0], 0.0),  # no variation, no correlation
        ([0.5], [1.0], 0.0),
    ],
)
def test_pearson(x: list[float], y: list[float], expected: float):
    assert pearson(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-9)


def critic(values: list[float], rewards: list[float]) -> dict[str, float]:
    tensors: list[Tensor] = [torch.tensor(values), torch.tensor(rewards)]
    return {name.removeprefix("critic/"): float(value) for name, value in critic_metrics(*tensors).items()}


def test_critic_metrics_by_hand():
    metrics = critic([0.9, 0.35, 0.62, 0.2], [1.0, 1.0, 0.0, 0.0])
    brier = (0.1**2 + 0.65**2 + 0.62**2 + 0.2**2) / 4
    assert metrics["brier"] == pytest.approx(brier, abs=1e-6)
    assert metrics["brier_skill"] == pytest.approx(1 - brier / 0.25, abs=1e-6)  # the rewards' variance is 1/4
    assert metrics["auroc"] == pytest.approx(3 / 4)  # of the four pairs only (0.35, 0.62) is in the wrong order
    # each value has a bin of its own, so the gaps are |0.9 − 1|, |0.35 − 1|, 0.62 and 0.2
    assert metrics["calibration_error"] == pytest.approx((0.1 + 0.65 + 0.62 + 0.2) / 4, abs=1e-6)
    centred = [0.9 - 0.5175, 0.35 - 0.5175, 0.62 - 0.5175, 0.2 - 0.5175]
    expected = (centred[0] + centred[1]) / 2 - (centred[2] + centred[3]) / 2
    assert metrics["pearson"] == pytest.approx(expected / math.sqrt(sum(c * c for c in centred)), abs=1e-6)


def test_a_critic_that_knows_only_the_mean_has_no_skill():
    metrics = critic([0.75] * 4, [1.0, 1.0, 1.0, 0.0])
    assert metrics["brier_skill"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["pearson"] == 0.0
    assert metrics["auroc"] == pytest.approx(0.5)
    assert metrics["calibration_error"] == pytest.approx(0.0, abs=1e-6)


def test_metrics_without_meaning_are_left_out():
    assert set(critic([0.5, 0.25], [1.0, 1.0])) == {"brier", "pearson", "calibration_error"}
    assert set(critic([0.5, 0.25], [0.75, 0.5])) == {"brier", "pearson", "calibration_error", "brier_skill"}
    assert set(critic([0.5] * 7, [0.1] * 7)) == {"brier", "pearson", "calibration_error"}  # variance 1e-17, not 0


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"val/sums/avg@4": 0.5, "val/sums/pass@4": 0.75, "reward/mean": 0.1}, {"all": 0.5, "sums": 0.5}),
        (
            {"val/a/avg@4": 0.5, "val/b/c/avg@16": 0.25, "val/all/avg@16": 0.3},
            {"all": 0.3, "a": 0.5, "b/c": 0.25},
        ),
        ({"reward/mean": 0.1}, {}),
    ],
)
def test_by_dataset(metrics: dict[str, float], expected: dict[str, float]):
    found = by_dataset({name: torch.tensor(value) for name, value in metrics.items()}, r"avg@\d+")
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)
