"""Components that do not go together are refused in one sentence, before anything is loaded."""

from typing import Any

import pytest
from tiny import AnyDigit, loader, make_batch, make_critic, make_policy, make_token_critic, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.advantages import (
    GAE,
    BatchMeanAdvantage,
    GreedyBaselineAdvantage,
    GroupAdvantage,
    HybridAdvantage,
    LeaveOneOutAdvantage,
)
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.objectives import (
    BinaryCrossEntropy,
    ClippedSquaredError,
    ImportanceWeightedObjective,
    SequenceClipObjective,
)
from sppo_lightning.replay import CriticReplay
from sppo_lightning.warmup import CriticWarmup

PROMPT_CRITIC = "sppo_lightning.models.PromptCritic, which reads the prompt alone."
TOKEN_CRITIC = "sppo_lightning.models.TokenCritic, which reads every token."


def refused(critic: Any = None, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        SPPOModule(make_policy(), critic, **settings)
    return str(raised.value)


def test_a_critic_that_nobody_uses():
    sentence = "`advantage`=GroupAdvantage uses no critic, but `model.critic` is TinyCritic; set it to null."
    assert refused(make_critic(), advantage=GroupAdvantage()) == sentence


def test_an_advantage_without_its_critic():
    assert refused() == f"`advantage`=SequenceAdvantage needs a critic; set `model.critic` to {PROMPT_CRITIC}"
    sentence = f"`advantage`=HybridAdvantage needs a critic; set `model.critic` to {TOKEN_CRITIC}"
    assert refused(advantage=HybridAdvantage()) == sentence


def test_an_advantage_with_the_other_kind_of_critic():
    sentence = f"`advantage`=GAE cannot use `model.critic`=TinyCritic; set `model.critic` to {TOKEN_CRITIC}"
    assert refused(make_critic(), advantage=GAE()) == sentence
    sentence = "`advantage`=SequenceAdvantage cannot use `model.critic`=TinyTokenCritic; set `model.critic` to "
    assert refused(make_token_critic()) == sentence + PROMPT_CRITIC


def test_a_squared_error_for_a_chance():
    assert refused(make_critic(), critic_objective=ClippedSquaredError()) == (
        "`critic_objective`=ClippedSquaredError cannot train TinyCritic, whose V is a chance; use "
        "sppo_lightning.objectives.BinaryCrossEntropy."
    )


def test_an_advantage_per_token_for_an_objective_of_sequences():
    assert refused(make_token_critic(), advantage=GAE(), objective=SequenceClipObjective()) == (
        "`objective`=SequenceClipObjective takes one advantage per response, and `advantage`=GAE gives one per token; "
        "use sppo_lightning.objectives.TokenClipObjective."
    )


def test_what_belongs_to_a_critic_without_one():
    assert refused(advantage=BatchMeanAdvantage(), critic_warmup=CriticWarmup(updates=2)) == (
        "`critic_warmup` is set, but there is no `model.critic` to warm up; remove it."
    )
    assert refused(make_token_critic(), advantage=GAE(), critic_replay=CriticReplay()) == (
        "`critic_replay` is set, and replays prompts, which `model.critic`=TinyTokenCritic does not learn from alone; "
        f"remove it, or set `model.critic` to {PROMPT_CRITIC}"
    )


def refused_at_setup(generation: RolloutGeneration, critic: bool = True, **settings: Any) -> str:
    policy = make_policy()
    module = SPPOModule(policy, make_critic() if critic else None, **settings)
    with pytest.raises(InputError) as raised:
        make_trainer(generation, AnyDigit()).fit(module, loader(make_batch(policy, ["1 + 1 ="])))
    return str(raised.value)


@pytest.mark.parametrize("advantage", [GroupAdvantage(), LeaveOneOutAdvantage()])
def test_a_group_of_one(advantage: Any):
    assert refused_at_setup(RolloutGeneration(), critic=False, advantage=advantage) == (
        f"`advantage`={type(advantage).__name__} compares the responses to one prompt, and `samples_per_prompt`=1 of "
        "RolloutGeneration's `sampling` gives it 1; use 2 or more, such as 8."
    )


def test_a_greedy_baseline_without_greedy_responses():
    assert refused_at_setup(RolloutGeneration(), critic=False, advantage=GreedyBaselineAdvantage()) == (
        "`advantage`=GreedyBaselineAdvantage needs a greedy response per prompt; set `greedy: true` on "
        "RolloutGeneration."
    )


@pytest.mark.parametrize(
    ("generation", "settings"),
    [
        (RolloutGeneration(Sampling(top_p=0.9)), {"recompute_old_log_probs": False}),
        (RolloutGeneration(Sampling(top_k=5), sample_from="reference"), {}),
        (RolloutGeneration(Sampling(top_p=0.5)), {"objective": ImportanceWeightedObjective()}),
    ],
    ids=["the sampler's log-probabilities", "another policy's responses", "importance weights"],
)
def test_importance_weights_of_a_truncated_distribution(generation: RolloutGeneration, settings: dict[str, Any]):
    other = "with another objective, sample" if "objective" in settings else "sample"
    assert refused_at_setup(generation, **settings) == (
        f"`top_p`={generation.sampling.top_p}, `top_k`={generation.sampling.top_k} and `min_p`=0.0 of RolloutGeneration's "
        "`sampling` cut tokens off: the sampler's log-probabilities are not the policy's, and their ratio is biased; "
        f"use top_p 1, top_k 0, min_p 0, or {other} from the policy with `recompute_old_log_probs: true`."
    )


@pytest.mark.parametrize(
    ("generation", "sampled"),
    [
        (RolloutGeneration(Sampling(top_p=0.9)), "`sample_from`=policy, `top_p`=0.9, `top_k`=0 and `min_p`=0.0"),
        (
            RolloutGeneration(sample_from="reference"),
            "`sample_from`=reference, `top_p`=1.0, `top_k`=0 and `min_p`=0.0",
        ),
    ],
)
def test_a_penalty_in_the_reward_that_would_be_of_another_policy(generation: RolloutGeneration, sampled: str):
    assert refused_at_setup(generation, kl_coef=0.1, kl_in="reward") == (
        f"`kl_in`=reward compares the policy that samples with the reference, and RolloutGeneration's {sampled} "
        "sample from something else; sample from the whole policy, or use `kl_in: loss`."
    )


def test_replay_by_another_loss_than_the_critics():
    class Own(BinaryCrossEntropy.__base__):  # type: ignore[name-defined, misc]
        critics = frozenset({"prompt"})

        def __call__(self, *_: Any) -> Any: ...

        def predict(self, outputs: Any) -> Any: ...

    assert refused(make_critic(), critic_objective=Own(), critic_replay=CriticReplay()) == (
        "`critic_objective`=Own and `critic_replay` would train the critic by two losses: what is replayed counts by "
        "binary cross-entropy. Remove one of them."
    )


def test_options_that_there_are_not():
    for name, value, known in (("kl_in", "advantage", "loss or reward"), ("kl_estimator", "k4", "k1 or k2 or k3")):
        with pytest.raises(InputError) as raised:
            SPPOModule(make_policy(), make_critic(), **{name: value})  # type: ignore[arg-type]
        assert str(raised.value) == f"`{name}`={value} is unknown; use {known}."
