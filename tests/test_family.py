"""The other algorithms of the family: one update of each against the same equations written out."""

import math
from typing import Any

import pytest
import torch
from by_hand import CASES, FAST, ByHand, assert_equal, fit, run
from tiny import RecordingSPPO, make_critic, make_policy, make_token_critic
from torch import Tensor

from sppo_lightning.advantages import GAE, BatchMeanAdvantage, GroupAdvantage, HybridAdvantage, LeaveOneOutAdvantage
from sppo_lightning.objectives import BinaryCrossEntropy, ClippedSquaredError, TokenClipObjective
from sppo_lightning.warmup import CriticWarmup

GROUPS: dict[str, list[tuple[str, float | None]]] = {
    "1 + 2 =": [("3 <eos>", 1.0), ("4 4 <eos>", 0.0), ("5 <eos>", 0.0)],
    "2 + 2 =": [("4 <eos>", 1.0), ("5", 0.5), ("4 4 4 <eos>", 1.0)],
    "8 8": [("d e f g", 0.0), ("d <eos>", 0.0), ("e e e <eos>", 0.0)],  # nothing to learn from
}


def with_critic(critic: Any, **settings: Any) -> RecordingSPPO:
    module = RecordingSPPO(make_policy(), critic, **FAST | settings)
    fit(module, CASES, temperature=0.7)
    return module


class TokenLevel:
    """PPO, one response after another: `V(s_t)` of what stands before token t, `A_t = R − V(s_t)`."""

    def __init__(self) -> None:
        self.by_hand = ByHand()
        self.policy, self.critic = self.by_hand.policy, make_token_critic().double()
        self.rows = self.by_hand.rows

    def values(self, row: dict[str, Any]) -> Tensor:
        prompt, response = (self.policy.tokenizer(row[key])["input_ids"] for key in ("prompt", "text"))
        prefixes = [torch.tensor([prompt + response[:t]]) for t in range(len(response))]
        return torch.stack([self.critic.model(input_ids=ids).logits[0, 0] for ids in prefixes])

    def gradients(self, predict: Any, value_loss: Any, advantage: Any) -> dict[str, Tensor]:
        outputs = [self.values(row) for row in self.rows]
        rewards = [row["R"] for row in self.rows]
        advantages = advantage(rewards, [predict(v.detach()) for v in outputs])
        tokens, loss = sum(len(v) for v in outputs), torch.zeros((), dtype=torch.float64)
        for row, v, a, reward in zip(self.rows, outputs, advantages, rewards, strict=True):
            # the ratio is 1 at the first update, where neither clip holds
            log_probs = self.by_hand.log_probs(self.policy, row)
            ratio = (log_probs - log_probs.detach()).exp()
            loss = loss - (ratio * a).sum() / tokens + value_loss(v, torch.full_like(v, reward)).sum() / tokens
        loss.backward()
        modules = {"policy": self.policy, "critic": self.critic}
        return {
            f"{n}.{k}": p.grad for n, m in modules.items() for k, p in m.named_parameters() if p.grad is not None
        }


def whitened(rewards: list[float], values: list[Tensor]) -> list[Tensor]:
    plain = [r - v for r, v in zip(rewards, values, strict=True)]
    every = torch.cat(plain)
    return [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in plain]


def half_squared(v: Tensor, target: Tensor) -> Tensor:
    return (v - target).square() / 2  # the clip around the old value does not hold at the first update


def cross_entropy(v: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(v, target, reduction="none")


def test_token_level_ppo():
    module = with_critic(make_token_critic(), advantage=GAE(), critic_objective=ClippedSquaredError())
    assert_equal(module.gradients[0], TokenLevel().gradients(lambda v: v, half_squared, whitened), atol=1e-6)


def test_token_level_ppo_with_cross_entropy():
    module = with_critic(make_token_critic(), advantage=GAE(), critic_objective=BinaryCrossEntropy())
    assert_equal(module.gradients[0], TokenLevel().gradients(torch.sigmoid, cross_entropy, whitened), atol=1e-6)


def test_the_hybrid_blends_what_the_critic_says_of_prompt_and_tokens():
    module = with_critic(make_token_critic(), advantage=HybridAdvantage(weight=0.25))

    def blend(rewards: list[float], values: list[Tensor]) -> list[Tensor]:
        return [0.25 * (r - v[0]) + 0.75 * (r - v) for r, v in zip(rewards, values, strict=True)]

    assert_equal(module.gradients[0], TokenLevel().gradients(torch.sigmoid, cross_entropy, blend), atol=1e-6)


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40, 1])
def test_token_level_ppo_does_not_depend_on_the_cut(micro_batch_tokens: int):
    settings: dict[str, Any] = {"advantage": GAE(), "critic_objective": ClippedSquaredError()}
    whole = with_critic(make_token_critic(), **settings)
    cut = with_critic(make_token_critic(), micro_batch_tokens=micro_batch_tokens, **settings)
    assert_equal(cut.gradients[0], whole.gradients[0])


class Sees(RecordingSPPO):
    """Keeps the prompts of each row that the policy's forward with gradient reads."""

    def micro_batches(self, *args: Any) -> Any:
        for micro in super().micro_batches(*args):
            self.seen += [p.text for p in micro.policy.rollouts.prompts] if micro.policy.verdicts.any() else []
            yield micro

    seen: list[str]


def groups(advantage: Any, **settings: Any) -> Sees:
    module = Sees(make_policy(), None, advantage=advantage, **FAST | settings)
    module.seen = []
    fit(module, GROUPS, temperature=0.7)
    return module


def by_hand_of_groups(advantages: list[float]) -> dict[str, Tensor]:
    hand = ByHand({p: [(text, r) for text, r in rows] for p, rows in GROUPS.items()})
    tokens, loss = sum(len(row["old"]) for row in hand.rows), torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(hand.rows, advantages, strict=True):
        log_probs = hand.log_probs(hand.policy, row)
        loss = loss - ((log_probs - log_probs.detach()).exp() * advantage).sum() / tokens
    loss.backward()
    return {f"policy.{k}": p.grad for k, p in hand.policy.named_parameters()}


def test_grpo_leaves_rows_without_an_advantage_out_and_is_exact():
    module = groups(GroupAdvantage())
    third = math.sqrt(1 / 3)  # unbiased standard deviation of 1, 0, 0
    sixth = math.sqrt((2 * (1 / 6) ** 2 + (1 / 3) ** 2) / 2)  # of 1, ½, 1
    expected = [
        2 / 3 / third,
        -1 / 3 / third,
        -1 / 3 / third,
        1 / 6 / sixth,
        -1 / 3 / sixth,
        1 / 6 / sixth,
        0,
        0,
        0,
    ]
    assert_equal(module.gradients[0], by_hand_of_groups(expected), atol=1e-5)  # GRPO adds 1e-6 to the deviation
    assert sorted(module.seen) == sorted(["1 + 2 ="] * 3 + ["2 + 2 ="] * 3)


def test_a_penalty_in_the_loss_needs_every_row():
    module = groups(GroupAdvantage(), kl_coef=0.1)
    assert len(module.seen) == 9


def test_rloo():
    # 1 − 0, 0 − ½, 0 − ½; 1 − ¾, ½ − 1, 1 − ¾
    module = groups(LeaveOneOutAdvantage())
    assert_equal(module.gradients[0], by_hand_of_groups([1.0, -0.5, -0.5, 0.25, -0.5, 0.25, 0, 0, 0]))


def test_the_batch_mean():
    module = groups(BatchMeanAdvantage())
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert_equal(module.gradients[0], by_hand_of_groups([r - 3.5 / 9 for r in rewards]))


def test_dr_grpo_divides_by_a_constant_length():
    objective = TokenClipObjective(aggregation="seq-mean-token-sum", constant_length=5)
    module = groups(GroupAdvantage(scale_by_std=False), objective=objective)
    tokens = sum(len(text.split()) for rows in GROUPS.values() for text, _ in rows)
    expected = [2 / 3, -1 / 3, -1 / 3, 1 / 6, -1 / 3, 1 / 6, 0, 0, 0]
    # the mean over 9 responses of their sums over tokens, by 5
    assert_equal(module.gradients[0], by_hand_of_groups([a * tokens / 9 / 5 for a in expected]))


def test_a_penalty_in_the_reward_moves_the_advantage_and_not_the_critics_target():
    # every sampled log-probability is −1 here, and so k1 = −1 − log π_ref at every token
    module, trainer = run(kl_coef=0.25, kl_estimator="k1", kl_in="reward")
    hand = ByHand()
    for row in hand.rows:
        row["shaping"] = -0.25 * float((-1.0 - row["old"]).clamp(-20, 20).sum())
    hand.update(list(range(8)))
    assert_equal(module.gradients[0], hand.gradients[0])
    assert float(trainer.callback_metrics["critic/loss"]) == pytest.approx(hand.losses[0]["critic"], abs=1e-6)
    assert "policy/kl" not in trainer.callback_metrics


def test_the_policy_waits_for_the_critic():
    module = RecordingSPPO(
        make_policy(), make_critic(), critic_warmup=CriticWarmup(updates=4), mini_batch_size=4, **FAST
    )
    before = {n: p.detach().clone() for n, p in module.policy.named_parameters()}
    fit(module, CASES, iterations=2)
    assert all(torch.equal(p, before[n].double()) for n, p in module.policy.named_parameters())
    assert module.critic_warmup is not None
    assert not module.critic_warmup.running
    assert all(not g.any() for update in module.gradients for n, g in update.items() if n.startswith("policy"))
    free = RecordingSPPO(
        make_policy(), make_critic(), critic_warmup=CriticWarmup(updates=2), mini_batch_size=4, **FAST
    )
    fit(free, CASES, iterations=2)
    assert any(not torch.equal(p, before[n].double()) for n, p in free.policy.named_parameters())
