import copy
import math
from typing import Any

import pytest
import torch

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts, Scores

NAN = math.nan


def rollouts() -> Rollouts:
    """Three responses to two prompts, of 2, 0 and 3 tokens."""
    prompts = [Prompt("a", "1", "sums", 0), Prompt("b c", "2", "sums", 1)]
    return Rollouts(
        prompts=[prompts[0], prompts[0], prompts[1]],
        prompt_index=torch.tensor([0, 0, 1]),
        prompt_ids=torch.tensor([[0, 7], [0, 7], [8, 9]]),
        prompt_mask=torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]),
        response_ids=torch.tensor([[3, 4, 0], [0, 0, 0], [5, 6, 7]]),
        response_mask=torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        sampled_log_probs=torch.tensor([[-1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [-3.0, -4.0, -5.0]]),
        responses=["x y", "", "z z z"],
        finish_reasons=["stop", "stop", "length"],
        temperature=0.6,
        policy_versions=torch.tensor([4, 4, 5]),
    )


def scored(**scores: tuple[list[float], float, str, float]) -> Rollouts:
    made = rollouts()
    for name, (values, weight, role, baseline) in scores.items():
        made.scores[name] = Scores(torch.tensor(values), weight, role, baseline)  # type: ignore[arg-type]
    return made


def test_the_reward_is_the_weighted_mean_of_the_outcomes():
    made = scored(
        exact=([1.0, 0.0, 1.0], 3.0, "outcome", 0.0),
        partial=([0.5, 1.0, 0.0], 1.0, "outcome", 0.0),
        length=([9.0, 9.0, 9.0], 5.0, "shaping", 0.0),
    )
    assert made.rewards.tolist() == [0.875, 0.25, 0.75]


@pytest.mark.parametrize("weights", [(0.1, 0.6), (0.3, 0.6), (0.8, 0.1), (0.7, 0.9), (1 / 3, 1 / 7)])
def test_full_marks_by_all_verifiers_are_exactly_1(weights: tuple[float, float]):
    first, second = (([1.0, 0.0, 1.0], weight, "outcome", 0.0) for weight in weights)
    assert scored(first=first, second=second).rewards.tolist() == [1.0, 0.0, 1.0]


def test_shaping_is_the_weighted_sum_above_the_baselines():
    made = scored(
        exact=([1.0, 0.0, 1.0], 3.0, "outcome", 0.0),
        length=([9.0, 7.0, 8.0], 0.5, "shaping", 8.0),
        form=([1.0, 0.0, 0.0], -2.0, "shaping", 0.25),
    )
    assert made.shaping.tolist() == [0.5 - 1.5, -0.5 + 0.5, 0.5]


def test_what_one_verifier_leaves_open_is_open():
    made = scored(
        exact=([1.0, NAN, 0.0], 1.0, "outcome", 0.0),
        partial=([1.0, 1.0, 0.5], 1.0, "outcome", 0.0),
        form=([NAN, 1.0, 1.0], 1.0, "shaping", 0.0),
    )
    assert made.rewards.isnan().tolist() == [False, True, False]
    assert made.rewards[[0, 2]].tolist() == [1.0, 0.25]
    assert made.shaping.isnan().tolist() == [True, False, False]


def test_without_verifiers_there_is_no_reward_and_no_shaping():
    assert rollouts().rewards.isnan().all()
    assert rollouts().shaping.tolist() == [0.0, 0.0, 0.0]


def test_rows_picks_from_every_field_and_changes_nothing():
    made = scored(exact=([1.0, 0.0, NAN], 1.0, "outcome", 0.0), form=([1.0, 2.0, 3.0], 0.5, "shaping", 1.5))
    before = copy.deepcopy(made)
    picked = made.rows([2, 0, 2])
    assert [p.text for p in picked.prompts] == ["b c", "a", "b c"]
    assert picked.prompt_index.tolist() == [1, 0, 1]
    assert picked.prompt_ids.tolist() == [[8, 9], [0, 7], [8, 9]]
    assert picked.prompt_mask.tolist() == [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    assert picked.response_ids.tolist() == [[5, 6, 7], [3, 4, 0], [5, 6, 7]]
    assert picked.response_mask.sum(1).tolist() == [3.0, 2.0, 3.0]
    assert picked.sampled_log_probs[1].tolist() == [-1.0, -2.0, 0.0]
    assert picked.responses == ["z z z", "x y", "z z z"]
    assert picked.finish_reasons == ["length", "stop", "length"]
    assert (picked.temperature, picked.policy_versions.tolist()) == (0.6, [5, 4, 5])
    assert picked.scores["form"].values.tolist() == [3.0, 1.0, 3.0]
    assert picked.scores["form"].baseline == 1.5
    assert picked.rewards.isnan().tolist() == [True, False, True]
    for name, value in vars(before).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(made, name), value)
    assert made.responses == before.responses
    torch.testing.assert_close(made.scores["exact"].values, before.scores["exact"].values, equal_nan=True)


def test_no_rows():
    none = scored(exact=([1.0, 0.0, 1.0], 1.0, "outcome", 0.0)).rows([])
    assert len(none) == len(none.responses) == len(none.rewards) == 0
    assert none.response_ids.shape == (0, 3)


def one_more(**changes: Any) -> Rollouts:
    """One response of 1 token to a prompt of 3 tokens."""
    fields: dict[str, Any] = {
        "prompts": [Prompt("d e f", "3", "sums", 2)],
        "prompt_index": torch.tensor([0]),
        "prompt_ids": torch.tensor([[4, 5, 6]]),
        "prompt_mask": torch.tensor([[1.0, 1.0, 1.0]]),
        "response_ids": torch.tensor([[9]]),
        "response_mask": torch.tensor([[1.0]]),
        "sampled_log_probs": torch.tensor([[-0.5]]),
        "responses": ["w"],
        "finish_reasons": ["stop"],
        "temperature": 0.6,
        "policy_versions": torch.tensor([7]),
    }
    return Rollouts(**fields | changes)


def test_concat_pads_prompts_on_the_left_and_responses_on_the_right():
    first = scored(exact=([1.0, 0.0, NAN], 3.0, "outcome", 0.0), form=([1.0, 2.0, 3.0], 0.5, "shaping", 1.5))
    second = one_more(
        scores={
            "exact": Scores(torch.tensor([0.5]), 3.0, "outcome"),
            "form": Scores(torch.tensor([7.0]), 0.5, "shaping", 1.5),
        }
    )
    joined = Rollouts.concat([first, second], [2, 2, 0, 1])
    assert [p.text for p in joined.prompts] == ["a", "a", "b c", "d e f"]
    assert joined.prompt_index.tolist() == [2, 2, 0, 1]
    assert joined.prompt_ids.tolist() == [[0, 0, 7], [0, 0, 7], [0, 8, 9], [4, 5, 6]]
    assert joined.prompt_mask.tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert joined.response_ids.tolist() == [[3, 4, 0], [0, 0, 0], [5, 6, 7], [9, 0, 0]]
    assert joined.response_mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert joined.sampled_log_probs.tolist() == [[-1, -2, 0], [0, 0, 0], [-3, -4, -5], [-0.5, 0, 0]]
    assert joined.responses == ["x y", "", "z z z", "w"]
    assert joined.finish_reasons == ["stop", "stop", "length", "stop"]
    assert (joined.temperature, joined.policy_versions.tolist()) == (0.6, [4, 4, 5, 7])
    assert joined.rewards[[0, 1, 3]].tolist() == [1.0, 0.0, 0.5]
    assert joined.rewards[2].isnan()
    assert joined.shaping.tolist() == [-0.25, 0.25, 0.75, 2.75]
    assert {name: (s.weight, s.role, s.baseline) for name, s in joined.scores.items()} == {
        "exact": (3.0, "outcome", 0.0),
        "form": (0.5, "shaping", 1.5),
    }
    assert first.prompt_ids.tolist() == [[0, 7], [0, 7], [8, 9]]  # the parts are as they were
    turned = Rollouts.concat([second, first], [1, 2, 2, 0])
    assert turned.response_ids.tolist() == [[9, 0, 0], [3, 4, 0], [0, 0, 0], [5, 6, 7]]


def test_concat_with_no_rows_on_one_side_or_both():
    none = one_more().rows([])
    joined = Rollouts.concat([none, rollouts()], [0, 0, 1])
    assert joined.prompt_ids.tolist() == [[0, 0, 7], [0, 0, 7], [0, 8, 9]]
    assert joined.responses == ["x y", "", "z z z"]
    assert len(Rollouts.concat([none, none], [])) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 1.0}, r"differ in temperature cannot be joined: \[0.6, 1.0\]"),
        ({"scores": {}}, "differ in verifiers"),
        ({"scores": {"exact": Scores(torch.tensor([1.0]), 2.0, "outcome")}}, "differ in weight of 'exact'"),
        ({"scores": {"exact": Scores(torch.tensor([1.0]), 1.0, "shaping")}}, "differ in role of 'exact'"),
    ],
)
def test_concat_refuses_what_does_not_belong_together(changes: dict[str, Any], words: str):
    first = scored(exact=([1.0, 0.0, 1.0], 1.0, "outcome", 0.0))
    with pytest.raises(ValueError, match=words):
        Rollouts.concat([first, one_more(**changes)], [0, 0, 1, 2])


def test_concat_needs_parts_and_an_index_for_each_response():
    with pytest.raises(ValueError, match=r"3 prompt indices for \[3, 1\] responses"):
        Rollouts.concat([rollouts(), one_more()], [0, 0, 1])
    with pytest.raises(ValueError, match=r"0 prompt indices for \[\] responses"):
        Rollouts.concat([], [])


@pytest.mark.parametrize(
    ("messages", "question"),
    [
        (None, "<user> 1 + 1 <assistant>"),
        (({"role": "user", "content": "1 + 1"},), "user: 1 + 1"),
        (({"role": "system", "content": "add"}, {"role": "user", "content": "1"}), "system: add\nuser: 1"),
    ],
)
def test_a_problem_is_its_turns_or_its_text(messages: tuple[dict[str, str], ...] | None, question: str):
    assert Prompt("<user> 1 + 1 <assistant>", "2", "sums", 0, messages).question == question


def test_a_prompt_batch_stays_where_it_is():
    batch = PromptBatch([Prompt("a", "1", "sums", 0)], [[7]], [0])
    assert len(batch) == 1
    assert batch.to(torch.device("meta")) is batch
    assert batch.rollouts is batch.greedy_rollouts is None


def test_rows_of_a_batch_are_a_new_batch_without_what_stages_added():
    prompts = [Prompt("a", "1", "sums", 0), Prompt("b", "2", "sums", 1)]
    batch = PromptBatch(prompts, [[7], [8, 9]], [0, 3], [0, 2])
    batch.rollouts = rollouts()
    picked = batch.rows([1])
    assert (picked.prompts, picked.token_ids, picked.visits, picked.rollouts) == ([prompts[1]], [[8, 9]], [3], None)
    assert (picked.first_samples, picked.keys) == ([2], [("sums", 1, 3, 2)])
    assert picked.noise_key(0, 4) == (prompts[1], 3, 6)
    assert len(batch.rows([])) == 0
