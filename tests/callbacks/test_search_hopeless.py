"""Prompts with a low V are searched, and the first update learns from what is found."""

import math
from typing import Any

import chain_run
import pytest
import torch
from tiny import RecordingSPPO, loader, make_batch, make_critic, make_policy, make_trainer, response_log_probs

from sppo_lightning.batch import Prompt, PromptBatch, Scores
from sppo_lightning.callbacks import RolloutGeneration, SearchHopeless, Verifier
from sppo_lightning.callbacks.search_hopeless import hopeless
from sppo_lightning.engines import BestOfN, HFEngine, Sampling, TreeSearchEngine
from sppo_lightning.errors import InputError
from sppo_lightning.found_losses import Demonstrations, FoundLoss, OffPolicySamples
from sppo_lightning.warmup import CriticWarmup

TEXTS = ["1 + 2 =", "2 + 2 =", "9 - 4 =", "8 8"]


class Says(Verifier):
    """Right where the response has the word."""

    def __init__(self, word: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.word = word

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(self.word in response.split()) for response in responses]


def run(*stages: Any, **settings: Any) -> tuple[RecordingSPPO, Any]:
    """One update on four prompts."""
    policy = make_policy()
    module = RecordingSPPO(policy, make_critic(zero=True), **settings)
    trainer = make_trainer(RolloutGeneration(Sampling(max_new_tokens=8)), *stages, max_steps=1)
    trainer.fit(module, loader(make_batch(policy, TEXTS)))
    return module, trainer


class Keeps(SearchHopeless):
    """What was found, and its prompts' values."""

    def process(self, batch: PromptBatch, trainer: Any, module: Any) -> None:
        super().process(batch, trainer, module)
        self.kept = batch.found, module.prompt_values(batch)


def test_hopeless_prompts_are_those_with_a_low_v_and_no_success():
    policy = make_policy()
    batch = make_batch(policy, [*TEXTS, "1"])
    engine = HFEngine()
    engine.update_weights(policy, 0)
    batch.rollouts = engine.generate(batch, Sampling(max_new_tokens=2))
    batch.rollouts.scores["given"] = Scores(torch.tensor([0.0, 0.0, 1.0, 0.0, math.nan]), 1.0, "outcome")
    values = torch.tensor([0.09, 0.5, 0.01, 0.02, 0.05])
    assert hopeless(batch, values, below=0.1, most=9) == [0, 4, 3]
    assert hopeless(batch, values, below=0.1, most=2) == [0, 4]


@pytest.mark.parametrize(
    "loss", [Demonstrations(), OffPolicySamples(max_weight=0.3)], ids=lambda x: type(x).__name__
)
def test_the_first_updates_gradient_has_the_auxiliary_losss(loss: FoundLoss):
    """Against a forward of this test's own on what was found; V is 1/2, so the advantage is too."""
    plain, _ = run(Says("q"))
    stage = Keeps(BestOfN(n=40), below=1.0, loss=loss, coef=0.5)
    with_search, trainer = run(Says("q"), stage)
    found, values = stage.kept
    assert values.tolist() == [0.5] * len(TEXTS)
    assert found
    assert all(each.reward == 1.0 and each.response_ids[-1] == 1 for each in found)
    policy, tokens = make_policy(), sum(len(each.response_ids) for each in found)
    expected = torch.zeros(())
    for each in found:
        log_likelihood = response_log_probs(policy, each.prompt_ids, each.response_ids).sum()
        weight = 1.0 if isinstance(loss, Demonstrations) else 0.5 * min(math.exp(-each.log_excess), 0.3)
        expected = expected - weight * log_likelihood / tokens
    gradients = torch.autograd.grad(expected, list(policy.parameters()))
    assert trainer.callback_metrics["search/loss"] == pytest.approx(float(expected), rel=1e-4)
    for (name, _), own in zip(policy.named_parameters(), gradients, strict=True):
        joined, alone = (each.gradients[0][f"policy.{name}"] for each in (with_search, plain))
        torch.testing.assert_close(joined - alone, 0.5 * own, atol=1e-5, rtol=1e-3)


def test_the_report():
    search = TreeSearchEngine(budget_tokens=200, branches=4, step_tokens=2, step_end=[";"])
    _, trainer = run(Says("q"), SearchHopeless(search, below=1.0, compare_every_n_iterations=1))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "search/" in name}
    for prefix in ("search/", "search/independent_"):
        prompts, tokens = metrics[f"{prefix}prompts"], metrics[f"{prefix}tokens"]
        assert 1 <= prompts <= 4
        assert 0 < tokens <= 200 * prompts
        solved = metrics[f"{prefix}solved_fraction"] * prompts
        assert metrics[f"{prefix}success_per_1k_tokens"] == pytest.approx(1000 * solved / tokens, rel=1e-4)


def test_nothing_is_searched_where_the_critic_has_hope():
    module, trainer = run(Says("q"), SearchHopeless(BestOfN(n=4), below=0.5, coef=1.0))
    plain, _ = run(Says("q"))
    assert trainer.callback_metrics["search/prompts"] == 0
    assert all(torch.equal(module.gradients[0][name], g) for name, g in plain.gradients[0].items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("silent", [0, 2], ids=["all judged", "one rank without verdicts"])
def test_two_processes_do_what_one_does(silent: int):
    """Where a rank has no verdict it finds nothing, and goes along with what the other one learns from."""
    one, two = (
        chain_run.run(devices, silent, None, 4, SearchHopeless(BestOfN(n=32), below=1.0, coef=1.0))
        for devices in (1, 2)
    )
    plain = chain_run.run(1, silent, None, 4)
    chain_run.check_same(one, two)
    for name in ("search/loss", "search/tokens", "search/solved_fraction"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-5)
    assert one[1]["search/loss"] > 0
    assert any((one[0][name] - plain[0][name]).abs().max() > 1e-4 for name in plain[0])


def test_nothing_is_searched_while_the_critic_warms_up():
    _, trainer = run(Says("q"), SearchHopeless(BestOfN(n=4), below=1.0), critic_warmup=CriticWarmup(updates=5))
    assert not [name for name in trainer.callback_metrics if name.startswith("search/")]


def test_settings_and_order_are_checked():
    with pytest.raises(InputError, match="`SearchHopeless.below`=0"):
        SearchHopeless(below=0)
    ahead = RolloutGeneration(Sampling(max_new_tokens=2), prefetch=1)
    trainer = make_trainer(ahead, Says("q"), SearchHopeless(BestOfN(n=2)))
    with pytest.raises(InputError, match="keeps its engine busy"):
        trainer.fit(RecordingSPPO(make_policy(), make_critic()), loader(make_batch(make_policy(), TEXTS)))
    with pytest.raises(InputError, match="SearchHopeless before Says"):
        run(SearchHopeless(BestOfN(n=2)), Says("q"))
