import itertools
import math
from typing import Any

import pytest
import torch

from sppo_lightning.batch import Prompt, Rollouts, Scores
from sppo_lightning.evaluation import (
    Evaluation,
    answer_key,
    by_dataset,
    majority_vote,
    metric_table,
    pass_at_k,
    problem_id,
    wilson_interval,
)

NAN = math.nan


def scored(*rows: tuple[str, float], responses: list[str] | None = None) -> Rollouts:
    """A response to each (question, reward), each a prompt of its own; "x" gives no answer."""
    n = len(rows)
    made = Rollouts(
        prompts=[Prompt(question, "1", "sums", row) for row, (question, _) in enumerate(rows)],
        prompt_index=torch.arange(n),
        prompt_ids=torch.ones(n, 1, dtype=torch.long),
        prompt_mask=torch.ones(n, 1),
        response_ids=torch.ones(n, 1, dtype=torch.long),
        response_mask=torch.ones(n, 1),
        sampled_log_probs=torch.zeros(n, 1),
        responses=responses or ["x"] * n,
        finish_reasons=["stop"] * n,
        temperature=1.0,
        policy_versions=torch.zeros(n, dtype=torch.long),
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
    values = torch.tensor([0.625, 0.625, 0.1875, 0.1875, 0.6875, 0.6875])
    metrics = report(["sums"], (0, rows, values))
    # rates (½, 0, 1) and values (0.625, 0.1875, 0.6875), both about 0.5; the variance of the rates is 1/6
    brier = (0.125**2 + 0.1875**2 + 0.3125**2) / 3
    in_one_bin = abs(0.625 + 0.6875 - 0.5 - 1) / 3  # the gaps of a and c, both in 0.6 to 0.7, partly cancel
    assert metrics == approx(
        {
            "val/sums/avg@2": 0.5,
            "val/sums/pass@2": 2 / 3,
            "val/sums/value_mean": 0.5,
            "val/sums/critic_pearson": 0.25 / math.sqrt(0.5 * (0.125**2 + 0.3125**2 + 0.1875**2)),
            "val/sums/critic_spearman": 1.0,
            "val/sums/critic_brier": brier,
            "val/sums/critic_brier_skill": 1 - brier * 6,
            "val/sums/critic_auroc": 1.0,
            "val/sums/critic_calibration_error": in_one_bin + 0.1875 / 3,
        }
    )


def test_the_problems_of_the_last_report_are_there_for_others_to_use():
    evaluation = Evaluation()
    evaluation.update(0, scored(("a", 1.0), ("b", NAN), ("a", 0.0)), torch.tensor([0.75, 0.5, 0.75]))
    evaluation.update(1, scored(("c", 0.5)), torch.tensor([0.25]))
    evaluation.report(["one", "two", "none"])
    evaluation.reset()
    found = evaluation.last_problems
    assert {name: table.values.tolist() for name, table in found.items()} == {
        "one": [0.75],
        "two": [0.25],
        "all": [0.75, 0.25],
    }
    assert found["all"].pass_rates.tolist() == [0.5, 0.5]
    assert [rewards.tolist() for rewards in found["all"].rewards] == [[1.0, 0.0], [0.5]]
    assert (found["all"].k, found["two"].k) == (2, 1)
    assert found["all"].pass_at(1) == pytest.approx((0.5 + 0.0) / 2)
    evaluation.report(["one"])
    assert evaluation.last_problems == {}


def test_the_majority_of_each_problems_answers_counts():
    answers = [r"\boxed{4}", r"\boxed{5}", r"so \boxed{4.0}", r"\boxed{x}", "none", r"\boxed{y}", "none"]
    rows = [("a", 0.0), ("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 0.0), ("b", 0.0), ("c", 0.0)]
    metrics = report(["sums"], (0, scored(*rows, responses=answers), None))
    # a: two of three say 4, which is wrong; b: x and y tie, and x came first; c: nobody votes
    assert metrics["val/sums/maj@3"] == pytest.approx((0 + 1 + 0) / 3)
    assert metrics["val/sums/avg@3"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)


def test_without_any_answer_there_is_no_majority():
    rows = [("a", 1.0), ("b", 0.0)]
    assert "val/sums/maj@1" not in report(["sums"], (0, scored(*rows), None))
    assert report(["sums"], (0, scored(*rows, responses=["x", "#### 7"]), None))["val/sums/maj@1"] == 0.0


def test_a_response_without_a_verdict_does_not_vote():
    answers = [r"\boxed{1}", r"\boxed{2}", r"\boxed{2}"]
    metrics = report(["sums"], (0, scored(("a", 1.0), ("a", NAN), ("a", NAN), responses=answers), None))
    assert metrics["val/sums/maj@1"] == 1.0


@pytest.mark.parametrize(
    ("answers", "rewards", "share", "reward"),
    [
        ([7.0, 8.0, 8.0], [1.0, 0.0, 0.0], 2 / 3, 0.0),
        ([7.0, 8.0, 7.0, 8.0], [1.0, 0.0, 1.0, 0.0], 0.5, 1.0),  # a tie goes to the answer that came first
        ([8.0, 7.0, 7.0, 8.0], [0.0, 1.0, 1.0, 0.0], 0.5, 0.0),
        ([NAN, NAN, 7.0], [0.0, 0.0, 1.0], 1 / 3, 1.0),  # those without an answer do not vote
        ([NAN, NAN], [1.0, 1.0], 0.0, 0.0),
        ([7.0, 7.0, 8.0], [1.0, 0.5, 0.0], 2 / 3, 0.75),  # one answer, two rewards
    ],
)
def test_the_vote_of_the_majority(answers: list[float], rewards: list[float], share: float, reward: float):
    assert majority_vote(torch.tensor(answers), torch.tensor(rewards)) == (share, reward)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (r"\boxed{4}", r"I think \boxed{ 4 }.", True),
        (r"\boxed{\frac12}", r"\boxed{0.5}", True),
        (r"\boxed{1{,}000}", "#### 1000", True),
        (r"\boxed{\dfrac{a}{b}}", r"\boxed{\frac{a}{b}}", True),
        (r"\boxed{3} no, \boxed{4}", r"\boxed{4}", True),  # the last box counts
        (r"\boxed{4}", r"\boxed{-4}", False),
        (r"\boxed{x=5}", r"\boxed{5}", False),
        (r"\boxed{12}", r"\boxed{1 2}", False),
    ],
)
def test_equal_answers_have_equal_keys(first: str, second: str, same: bool):
    assert (answer_key(first) == answer_key(second)) is same


def test_no_answer_has_no_key():
    assert math.isnan(answer_key("I do not know"))
    assert math.isnan(answer_key(r"\boxed{4"))
    assert answer_key(r"\boxed{\frac}") == answer_key(r"\boxed{ \frac }")  # what breaks off is still an answer
    keys = [answer_key(rf"\boxed{{{i}}}") for i in range(1000)]
    assert len(set(keys)) == 1000
    assert all(key == int(key) < 2**48 for key in keys)


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


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_all_draws_with_a_success(n: int):
    for successes, k in itertools.product(range(n + 1), range(1, n + 1)):
        rewards = [1.0] * successes + [0.0] * (n - successes)
        draws = list(itertools.combinations(rewards, k))
        expected = sum(max(draw) for draw in draws) / len(draws)
        assert pass_at_k(torch.tensor(rewards), k) == pytest.approx(expected, abs=1e-12)


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


def test_the_table_of_metrics():
    metrics = {"val/all/avg@2": 0.25, "val/my/set/avg@2": 0.5, "val/other/avg@2": 0.0, "val/other/maj@2": 1.0}
    table = metric_table(metrics, "Validation")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns == {
        "metric": ["avg@2", "maj@2"],
        "my/set": ["0.500", "–"],
        "other": ["0.000", "1.000"],
        "all": ["0.250", "–"],
    }
    assert list(columns)[-1] == "all"


def test_greedy_counts_problems_and_not_rows():
    greedy = scored(("a", 1.0), ("a", 1.0), ("a", 1.0), ("b", 0.0))  # a stands in the file three times
    metrics = report(["sums"], (0, scored(("a", 1.0), ("b", 0.0)), None), (0, greedy, None, True))
    assert metrics["val/sums/greedy"] == pytest.approx(0.5)


def test_a_question_in_two_data_sets_is_two_problems():
    metrics = report(["one", "two"], (0, scored(("a", 1.0), ("b", 0.0)), None), (1, scored(("a", 0.0)), None))
    assert metrics["val/all/avg@1"] == pytest.approx(1 / 3)
    assert metrics["val/all/pass@1"] == pytest.approx(1 / 3)


def test_wilsons_interval():
    # by scipy.stats.binomtest(8, 32).proportion_ci(method="wilson"), whose quantile has more digits
    assert wilson_interval(0.25, 32) == pytest.approx((0.132524, 0.421066), abs=1e-5)
    assert wilson_interval(0.0, 100) == pytest.approx((0.0, 3.8416 / 103.8416))
    assert wilson_interval(1.0, 100) == pytest.approx((100 / 103.8416, 1.0))
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
