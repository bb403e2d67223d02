"""What is kept, what goes first, and what is drawn."""

import math
from array import array
from typing import Any

import torch

from sppo_lightning.batch import Prompt, Success
from sppo_lightning.success_store import SuccessStore


def success(row: int, *response: int, log_prob: float = -1.0, **settings: Any) -> Success:
    prompt = Prompt(str(row), "5", "sums", row, metadata={"level": 3})
    return Success(prompt, [5 + row], response, [log_prob] * len(response), 1.0, **settings)


def kept(store: SuccessStore) -> list[tuple[int, list[int], int]]:
    """Row, response and iteration of each, in the store's order."""
    return [(each.prompt.row, [*each.response_ids], each.iteration) for each in store.stored]


def iterations(store: SuccessStore, *parts: list[Success]) -> None:
    for part in parts:
        store.add(part)
        store.iteration += 1


def test_what_was_seen_longest_ago_makes_room():
    store = SuccessStore(capacity=3, per_prompt=2, seed=0)
    iterations(store, [success(1, 7, 1), success(0, 8, 1)], [success(0, 9, 1)])
    assert kept(store) == [(0, [8, 1], 0), (1, [7, 1], 0), (0, [9, 1], 1)]
    iterations(store, [success(0, 6, 1)])  # the prompt's third: its first goes
    assert kept(store) == [(1, [7, 1], 0), (0, [9, 1], 1), (0, [6, 1], 2)]
    iterations(store, [success(2, 7, 1)])  # the fourth of all
    assert kept(store) == [(0, [9, 1], 1), (0, [6, 1], 2), (2, [7, 1], 3)]


def test_what_is_seen_again_is_as_young_as_new():
    store = SuccessStore(capacity=9, per_prompt=2, seed=0)
    first = [success(0, 8, 1, log_excess=2.0), success(0, 9, 1)]
    iterations(store, first, [success(0, 8, 1, log_prob=-0.5), success(1, 8, 1)])
    assert kept(store) == [(0, [9, 1], 0), (0, [8, 1], 1), (1, [8, 1], 1)]  # of another prompt it is another one
    again = store.stored[1]
    assert ([*again.log_probs], again.log_excess) == ([-0.5, -0.5], 0.0)


def test_the_order_of_ranks_changes_nothing():
    found = [success(row, 4 + row % 3, 1) for row in range(6)]
    one, other = (SuccessStore(capacity=4, per_prompt=1, seed=0) for _ in range(2))
    iterations(one, found)
    iterations(other, found[::-1])
    assert kept(one) == kept(other) == [(row, [4 + row % 3, 1], 0) for row in (2, 3, 4, 5)]


def test_what_has_no_weight_is_left_out():
    store = SuccessStore(capacity=9, per_prompt=9, seed=0)
    store.add([success(0, 8, 1, log_prob=-math.inf), success(1, 8, 1, log_prob=math.nan), success(2, 8, 1)])
    assert kept(store) == [(2, [8, 1], 0)]


def test_retired_prompts_leave():
    store = SuccessStore(capacity=9, per_prompt=9, seed=0)
    store.add([success(0, 8, 1), success(1, 8, 1), success(0, 9, 1)])
    assert store.retire({("sums", 0), ("other", 1), ("sums", 7)}) == 2
    assert kept(store) == [(1, [8, 1], 0)]


def test_draws_are_even_differ_between_iterations_and_go_on_after_a_resume():
    store = SuccessStore(capacity=10, per_prompt=1, seed=3)
    store.add([success(row, 8, 1) for row in range(10)])

    def draws(of: SuccessStore) -> list[list[int]]:
        found = []
        for of.iteration in range(500):
            found.append([each.prompt.row for each in of.draw(3)])
            assert [each.prompt.row for each in of.draw(3)] == found[-1]
        return found

    drawn = draws(store)
    assert all(len({*rows}) == 3 for rows in drawn)
    counts = torch.tensor([sum(row in rows for rows in drawn) for row in range(10)])
    assert (counts - 150).abs().max() < 50  # 150 ± 10 each; five standard deviations
    store.iteration = 7
    again = SuccessStore(capacity=10, per_prompt=1, seed=3)
    again.load_state_dict(store.state_dict())
    assert again.iteration == 7
    assert [vars_of(each) for each in again.stored] == [vars_of(each) for each in store.stored]
    assert isinstance(again.stored[0].response_ids, array)
    assert draws(again) == drawn
    assert [each.prompt.row for each in store.draw(99)] == [*range(10)]
    assert SuccessStore(capacity=1, per_prompt=1, seed=0).draw(4) == []


def vars_of(each: Success) -> dict[str, Any]:
    return {name: getattr(each, name) for name in Success.__slots__}
