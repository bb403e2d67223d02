import copy
import math

import pytest
import torch

from sppo_lightning.batch import Experience, Prompt, PromptBatch, Rollouts, Scores

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
        policy_version=4,
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
    assert (picked.temperature, picked.policy_version) == (0.6, 4)
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


def test_experience_masks_what_has_no_verdict():
    made = Experience(
        rollouts(), torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, -0.5, 0.0]), torch.tensor([True, True, False])
    )
    assert made.mask.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert made.lengths == [3, 1, 5]
    picked = made.rows([2, 0])
    assert picked.lengths == [5, 3]
    assert picked.rewards.tolist() == [0.5, 1.0]
    assert picked.advantages.tolist() == [0.0, 0.5]
    assert picked.verdicts.tolist() == [False, True]
    assert picked.rollouts.responses == ["z z z", "x y"]


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
