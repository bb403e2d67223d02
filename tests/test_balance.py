"""Rows are dealt so that ranks have about as many tokens, and nothing is lost on the way."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import make_batch, make_critic, make_policy

from sppo_lightning import SPPOModule
from sppo_lightning.balance import balanced, destinations
from sppo_lightning.batch import Rollouts
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.experience import Experience


def loads(costs: list[list[int]], targets: list[list[int]]) -> list[int]:
    found = [0] * len(costs)
    for own, theirs in zip(costs, targets, strict=True):
        for cost, to in zip(own, theirs, strict=True):
            found[to] += cost
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_get_about_as_many_tokens_and_as_many_rows_as_they_had(ranks: int):
    generator = random.Random(ranks)
    costs = [[round(generator.lognormvariate(6, 0.8)) for _ in range(32)] for _ in range(ranks)]
    targets = destinations(costs)
    counts = [sum(row.count(rank) for row in targets) for rank in range(ranks)]
    assert counts == [32] * ranks
    before, after = max(map(sum, costs)), max(loads(costs, targets))
    mean = sum(map(sum, costs)) / ranks
    assert after < 1.02 * mean < before


def test_ranks_with_more_rows_than_others_hand_them_on():
    generator = random.Random(0)
    costs = [[round(generator.lognormvariate(6, 0.8)) for _ in range(count)] for count in (2, 23, 1, 9)]
    targets = destinations(costs)
    assert [sum(row.count(rank) for row in targets) for rank in range(4)] == [9, 9, 9, 8]
    assert max(loads(costs, targets)) < 1.02 * sum(map(sum, costs)) / 4
    assert destinations([[1, 1, 1, 1, 0, 0], [0]]) == [[0, 1, 0, 1, 0, 0], [1]]
    assert destinations([[6], [2, 2, 2]]) == [[0], [1, 1, 1]]  # as good as can be


@pytest.mark.parametrize(
    "costs",
    [
        [[5, 5], [5, 5]],  # as good as can be
        [[100, 1], [99, 1]],  # good enough
        [[0, 0], [0, 0]],  # nothing to do
        [[9], [1]],  # a rank must have the long one
        [[3, 2, 1]],
    ],
)
def test_rows_stay_where_they_are_if_that_is_as_good(costs: list[list[int]]):
    assert destinations(costs) == [[rank] * len(own) for rank, own in enumerate(costs)]


def test_rows_that_cost_nothing_fill_the_places_that_are_left():
    assert destinations([[10, 10], [0, 0]]) == [[0, 1], [1, 0]]
    assert destinations([[8, 2, 0], [0, 0]]) == [[0, 1, 1], [0, 0]]


def experience_of(rank: int) -> Experience:
    """Three rows of this rank, all different; the second rank's responses are longer."""
    policy, engine = make_policy(), HFEngine()
    engine.update_weights(policy, rank)
    texts = [["1 + 2 =", "a", "b c"], ["9 - 4 = ; a b c", "4 ; 4", "q r s"]][rank]
    batch = make_batch(policy, texts, first_row=10 * rank)
    rollouts = engine.generate(batch, Sampling(max_new_tokens=[3, 16][rank]))
    numbers = torch.arange(3.0) + 10 * rank
    per_token = rollouts.response_mask * (1 + numbers[:, None])
    verdicts = torch.tensor([True, rank == 0, True])
    return Experience(rollouts, numbers / 20, per_token, verdicts, per_token + 0.5, None)


def hand_over(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = SPPOModule(make_policy(), make_critic())
    module.moving_modules = lambda: {"policy": None}  # type: ignore[method-assign,assignment,dict-item,return-value]
    before = experience_of(rank)
    after = balanced(module, before)
    again = balanced(module, after)
    torch.save({"before": contents(before), "after": contents(after), "again": contents(again)}, f"{folder}/{rank}")
    dist.destroy_process_group()


def contents(experience: Experience) -> list[list[Any]]:
    """All that is learned from, row by row, without padding."""
    rollouts: Rollouts = experience.rollouts
    rows = []
    for i in range(len(experience)):
        prompt, response = rollouts.prompt_mask[i] > 0, rollouts.response_mask[i] > 0
        tokens = (rollouts.response_ids, rollouts.sampled_log_probs, experience.advantages, experience.values)
        rows.append(
            [
                rollouts.prompts[i].row,
                rollouts.prompts[i].text,
                rollouts.responses[i],
                rollouts.finish_reasons[i],
                int(rollouts.policy_versions[i]),
                rollouts.prompt_ids[i][prompt].tolist(),
                *(each[i][response].tolist() for each in tokens if each is not None),
                float(experience.rewards[i]),
                bool(experience.verdicts[i]),
            ]
        )
    return rows


def test_what_two_processes_have_together_is_what_they_had(tmp_path: Any):
    mp.start_processes(hand_over, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert [len(rank["after"]) for rank in (first, second)] == [3, 3]
    assert first["after"] != first["before"]
    for step in ("after", "again"):
        assert sorted(first[step] + second[step]) == sorted(first["before"] + second["before"])
    size = [sum(len(row[5]) + len(row[6]) for row in rank["after"] if row[-1]) for rank in (first, second)]
    was = [sum(len(row[5]) + len(row[6]) for row in rank["before"] if row[-1]) for rank in (first, second)]
    assert max(size) < max(was)
