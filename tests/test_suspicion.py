import math
from typing import Any

import pytest
import torch
from given import outcomes

from sppo_lightning.batch import Rollouts, Scores
from sppo_lightning.suspicion import Record, merge, spread, suspects, worst
from sppo_lightning.verification.hacking import Reading

PLAIN, SHORT, SPAM = Reading(0.0, 99, False), Reading(0.25, 2, False), Reading(0.0, 2, True)


def rollouts(*rewards: float) -> Rollouts:
    made = outcomes([(row, 0.0, 0.0) for row in range(len(rewards))]).rollouts
    made.responses = [f"response {row}" for row in range(len(rewards))]
    made.scores["paid"] = Scores(torch.tensor(rewards), 1.0, "outcome")
    return made


def test_texts_are_summed():
    record = Record()
    record.read(rollouts(1.0, 0.0, 1.0, math.nan), [PLAIN, SHORT, SHORT, SPAM], 20)
    assert record.sums == {
        "response_tokens": (4.0, 4, 4.0),
        "repeated_ngrams": (0.5, 4, 0.125),
        "candidate_spam": (1.0, 4, 1.0),
        "without_reasoning": (1.0, 2, 1.0),  # of the two that are correct
    }


def test_scores_without_a_verdict_or_that_do_not_count_are_left_out():
    applies = torch.tensor([True, True, True, False])
    scores = {"paid": Scores(torch.tensor([1.0, 0.5, math.nan, 1.0]), 2.0, "outcome", applies=applies)}
    record = Record()
    record.score(scores)
    assert record.scores == {"paid": (1.5, 2, 1.25)}


def test_a_check_is_compared_on_the_same_responses():
    record = Record()
    record.compare("strict", [1.0, 1.0, 0.5, math.nan, 1.0], [1.0, 0.25, 0.0, 0.0, None])
    assert record.metrics() == {
        "strict/score": pytest.approx(1.25 / 3),
        "strict/gap": pytest.approx(1.25 / 3),
        "strict/disagreement": pytest.approx(1 / 3),
    }
    record.compare("silent", [1.0], [None])
    assert record.sums["silent/gap"] == (0.0, 0, 0.0)
    assert "silent/gap" not in record.metrics()


def test_equal_responses_to_a_prompt_count_once():
    record = Record(said=[("sums", 0, 1), ("sums", 0, 1), ("sums", 1, 1), ("sums", 1, 2), ("more", 1, 3)])
    assert record.distinct() == (3.0, 4.0, 3.0)
    assert Record().distinct() == (0.0, 0.0, 0.0)


def test_records_add_up():
    parts = [
        Record(
            {"a": (1.0, 2, 0.5)}, {"paid": (1.0, 1, 1.0)}, {"x": 1}, [("sums", 0, 7)], {"x": "first"}, [{"n": 1}]
        ),
        Record(),
        Record(
            {"a": (2.0, 1, 4.0), "b": (5.0, 1, 25.0)}, {}, {"x": 2}, [("sums", 1, 7)], {"x": "later"}, [{"n": 2}]
        ),
    ]
    merged = merge(parts)
    assert merged.sums == {"a": (3.0, 3, 4.5), "b": (5.0, 1, 25.0)}
    assert merged.metrics() == {"a": 1.0, "b": 5.0, "x/failures": 3.0}
    assert (merged.scores, merged.causes) == ({"paid": (1.0, 1, 1.0)}, {"x": "first"})
    assert (merged.distinct(), merged.examples) == ((1.0, 2.0, 1.0), [{"n": 1}, {"n": 2}])
    assert parts[0].sums == {"a": (1.0, 2, 0.5)}


def test_rows_are_spread_evenly():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread([3, 4], 4) == [3, 4]
    assert spread([], 4) == []


def test_only_what_was_rewarded_is_suspicious():
    made = rollouts(1.0, 0.0, math.nan, 0.5, 1.0)
    checked = {"strict": [0.25, 0.0, 0.0, None, 1.0], "mild": [0.75, 1.0, None, None, None]}
    found = suspects(made, [PLAIN, SPAM, SPAM, SPAM, PLAIN], checked, 20, 7)
    assert [(each["row"], each["suspicion"]) for each in found] == [(0, 0.75), (3, 0.5)]
    assert found[0]["reasons"] == ["strict gives 0.25", "mild gives 0.75"]
    assert found[0]["checks"] == {"strict": 0.25, "mild": 0.75}
    assert found[1]["reasons"] == ["offers several answers", "2 characters beside the answer"]


def test_the_worst_are_the_most_suspicious_and_then_the_newest():
    def example(suspicion: float, iteration: int, response: str) -> dict[str, Any]:
        return {
            "suspicion": suspicion,
            "iteration": iteration,
            "response": response,
            "dataset": "sums",
            "row": 0,
        }

    given = [example(0.5, 3, "a"), example(1.0, 1, "b"), example(1.0, 2, "c"), example(1.0, 1, "c")]
    assert worst(given, 3) == [given[2], given[1], given[0]]
    assert worst(given, 0) == []
