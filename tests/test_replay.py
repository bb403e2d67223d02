"""Critic replay against the same equations by hand."""

from typing import Any

import pytest
import torch
from by_hand import CASES, FAST, ByHand, assert_equal, run, stages
from given import outcomes
from tiny import RecordingSPPO, loader, make_batch, make_critic, make_policy, make_trainer
from torch import Tensor

from sppo_lightning import SPPOModule
from sppo_lightning.advantages import GAE
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Experience
from sppo_lightning.models import TokenCritic
from sppo_lightning.replay import CriticReplay

LAST = ["q r s t u", "8 8"]  # what the second iteration of `seen_again` has, of CASES


def cross_entropy(v: Tensor, reward: float) -> Tensor:
    return -reward * torch.nn.functional.logsigmoid(v) - (1 - reward) * torch.nn.functional.logsigmoid(-v)


def stored(replay: CriticReplay, rows: list[int], targets: list[float], verdicts: list[bool] | None = None) -> None:
    """Keep an iteration with these rows of the data set."""
    replay.store(experience(rows, targets, verdicts))


def experience(rows: list[int], targets: list[float], verdicts: list[bool] | None = None) -> Experience:
    rewards, kept = torch.tensor(targets, dtype=torch.float64), torch.tensor(verdicts or [True] * len(rows))
    rollouts = outcomes([(row, 1.0, 0.0) for row in rows]).rollouts
    return Experience(rollouts, rewards, rewards, kept, targets=rewards)


def test_what_is_drawn_weighs_by_its_age():
    replay = CriticReplay(capacity=3, ratio=2.0, half_life_iterations=2.0)
    update = experience([7, 8], [1.0, 0.0])
    empty = replay.draw(update, 0)
    assert [p.row for p in empty.prompts] == [7]
    assert empty.weights.tolist() == [0.0]
    stored(replay, [0, 1], [0.25, 0.0])
    stored(replay, [2, 3], [1.0, 0.5], verdicts=[True, False])  # row 3 has none, so nothing to learn from
    stored(replay, [4], [0.75])  # row 0 leaves: the capacity is 3
    drawn = replay.draw(update, 0)  # 2 × 2 are asked for, and 3 are there
    assert [p.row for p in drawn.prompts] == [1, 2, 4]
    assert drawn.targets.tolist() == [0.0, 1.0, 0.75]
    assert drawn.ages.tolist() == [3.0, 2.0, 1.0]
    assert [[*ids] for ids in drawn.token_ids] == [[6], [7], [9]]
    assert drawn.weights.tolist() == pytest.approx([0.5**1.5, 0.5, 0.5**0.5])
    masked = drawn.rows([2], counts=False)
    assert (masked.prompts[0].row, masked.weights.tolist(), masked.targets.tolist()) == (4, [0.0], [0.75])


def test_draws_are_even_and_differ_from_update_to_update_but_not_from_run_to_run():
    replay = CriticReplay(ratio=1.0)
    stored(replay, [*range(10)], [0.5] * 10)
    update = experience([7, 8, 9], [1.0, 0.0, 1.0])
    draws = [[p.row for p in replay.draw(update, number).prompts] for number in range(500)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = torch.tensor([sum(row in draw for draw in draws) for row in range(10)])
    assert (counts - 150).abs().max() < 50  # 150 ± 10 each; five standard deviations
    again = CriticReplay(ratio=1.0)
    again.load_state_dict(replay.state_dict())
    assert again.stored == replay.stored
    assert [[p.row for p in again.draw(update, number).prompts] for number in range(500)] == draws
    other = CriticReplay(ratio=1.0, seed=1)
    other.load_state_dict(replay.state_dict())
    assert [[p.row for p in other.draw(update, number).prompts] for number in range(500)] != draws


def test_the_stores_of_two_ranks_become_one():
    replay = CriticReplay()
    stored(replay, [0, 1], [0.0, 1.0])
    first = replay.state_dict()
    stored(replay, [2], [0.5])
    state = {"iteration": 2, "stored": [replay.state_dict()["stored"][0][2:], first["stored"][0]]}
    replay.load_state_dict(state)
    assert [(row.prompt.row, row.target, row.iteration) for row in replay.stored] == [
        (0, 0.0, 0),
        (1, 1.0, 0),
        (2, 0.5, 1),
    ]


def seen_again(**settings: Any) -> tuple[RecordingSPPO, Any]:
    """An iteration of all CASES but the last two, another of those two, and a third of all."""
    replay = CriticReplay(ratio=100.0, half_life_iterations=0.5)
    module = RecordingSPPO(make_policy(), make_critic(), critic_replay=replay, **FAST | settings)
    parts = [[p for p in CASES if p not in LAST], LAST, list(CASES)]
    trainer = make_trainer(*stages(CASES, 0.7), precision="64-true")
    trainer.fit(module, loader(*(make_batch(module.policy, part) for part in parts)))
    return module, trainer


def test_the_updates_of_three_iterations_by_hand():
    module, trainer = seen_again()
    assert trainer.global_step == 3
    hand = ByHand()
    index = {row["prompt"]: i for i, row in enumerate(hand.rows)}
    parts = [[index[p] for p in CASES if p not in LAST], [index[p] for p in LAST], list(range(8))]
    losses = []
    for i, part in enumerate(parts):
        hand.begin_iteration()
        # weights: half life 1/2, so 1/4 after one iteration and 1/16 after two
        old = [(row, 0.25 ** (i - j)) for j in range(i) for row in parts[j]]
        total = sum(weight for _, weight in old)
        loss = torch.zeros((), dtype=torch.float64)
        for row, weight in old:
            loss = loss + weight / total * cross_entropy(hand.value(hand.rows[row]["prompt"]), hand.rows[row]["R"])
        if old:
            loss.backward()  # its gradient adds to what `update` finds
        losses.append(loss.item())
        hand.update(part)
    for ours, theirs in zip(module.gradients, hand.gradients, strict=True):
        assert_equal(ours, theirs, atol=1e-5)
    logged = trainer.callback_metrics
    assert float(logged["critic/replay_loss"]) == pytest.approx(losses[2], abs=1e-5)
    assert float(logged["critic/replay_age"]) == (6 * 2 + 2 * 1) / 8
    assert float(logged["critic/loss"]) == pytest.approx(hand.losses[2]["critic"], abs=1e-5)


def test_the_first_iteration_is_that_of_a_run_without_replay():
    module, _ = run(critic_replay=CriticReplay())
    plain, _ = run()
    assert_equal(module.gradients[0], plain.gradients[0], atol=0.0)


def test_the_cut_into_micro_batches_changes_nothing():
    whole, trainer = seen_again()
    for budget in (30, 1):
        module, other = seen_again(micro_batch_tokens=budget)
        assert module.backwards > whole.backwards
        for ours, theirs in zip(module.gradients, whole.gradients, strict=True):
            assert_equal(ours, theirs)
        for name in ("critic/replay_loss", "critic/replay_age", "critic/loss", "policy/loss"):
            assert float(other.callback_metrics[name]) == pytest.approx(
                float(trainer.callback_metrics[name]), abs=1e-5
            )


def test_what_replays_nothing_is_refused():
    with pytest.raises(InputError) as raised:
        CriticReplay(ratio=0)
    sentence = "`CriticReplay.ratio`=0 replays nothing; use more than 0, or leave `critic_replay` out."
    assert str(raised.value) == sentence
    with pytest.raises(InputError) as raised:
        SPPOModule(make_policy(), TokenCritic(config={}), GAE(), critic_replay=CriticReplay())
    assert str(raised.value) == (
        "`critic_replay` is set, and replays prompts, which `model.critic`=TokenCritic does not learn from alone; "
        "remove it, or set `model.critic` to sppo_lightning.models.PromptCritic, which reads the prompt alone."
    )
