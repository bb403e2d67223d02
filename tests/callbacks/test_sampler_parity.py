"""SamplerParity: quiet where engine and trainer agree, one sentence where they do not, and no trace in the run."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import EvenRows, KnowsWhatFollows, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning import SFTModule, SPPOModule
from sppo_lightning.callbacks import ReferenceRefresh, RolloutGeneration, SamplerParity
from sppo_lightning.engines import Engine, HFEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer

SAMPLING = Sampling(max_new_tokens=12, top_k=5, temperature=0.7)


class Stale(HFEngine):
    """Goes on with the weights that it was given first."""

    def update_weights(self, policy: Any, version: int) -> None:
        if self.policy is None:
            super().update_weights(copy.deepcopy(policy), version)
        self.version = version


class Remembers(SamplerParity):
    """Keeps the updates before each check."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.checked_at: list[int] = []

    def check(self, trainer: Any, *others: Any) -> None:
        self.checked_at.append(trainer.global_step)
        super().check(trainer, *others)


def fit(
    *checks: Callback,
    sampling: Sampling = SAMPLING,
    engine: Engine | None = None,
    lr: float = 0.01,
    **settings: Any,
) -> Any:
    module = SPPOModule(make_policy(), make_critic(zero=True), policy_optimizer=GroupOptimizer(lr=lr))
    texts = ["1 + 2 =", "8 8", "4 ; 4", "q r s"]
    batches = [make_batch(module.policy, texts, first_row=4 * i) for i in range(4)]
    stages = [RolloutGeneration(sampling, engine=engine, **settings), EvenRows(), *checks]
    trainer = make_trainer(*stages)
    trainer.fit(module, KnowsWhatFollows(batches))  # type: ignore[arg-type]
    return module, trainer.callback_metrics


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 1])
def test_an_engine_that_agrees_leaves_no_trace(prefetch: int):
    parity = Remembers(every_n_iterations=2, max_gap=1e-5)
    checked, metrics = fit(parity, prefetch=prefetch)
    plain, _ = fit(prefetch=prefetch)
    assert parity.checked_at == [0, 1, 2]
    assert 0 < metrics["sampler/parity_gap_mean"] < metrics["sampler/parity_gap_max"] < 1e-4
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, checked.state_dict()[name]), name


def test_stale_weights_are_found_after_the_first_update():
    parity = Remembers(every_n_iterations=3)
    with pytest.raises(InputError) as raised:
        fit(parity, engine=Stale())
    assert parity.checked_at == [0, 1]
    start = "The log-probabilities of Stale and those of the trainer, in float32, differ by "
    assert str(raised.value).startswith(start)
    mean, most = (float(str(raised.value).split(words)[1].split()[0].rstrip("),")) for words in ("by ", "at most "))
    assert 1e-3 < mean < most
    assert "`SamplerParity.max_gap` is 0.001: the engine samples from other weights" in str(raised.value)


def test_a_reference_that_samples_is_compared_with_itself():
    parity = Remembers(every_n_iterations=1, max_gap=1e-5)
    _, metrics = fit(
        parity,
        ReferenceRefresh(every_n_updates=3),
        sample_from="reference",
        sampling=Sampling(max_new_tokens=12),
    )
    assert len(parity.checked_at) == 4
    assert metrics["sampler/parity_gap_max"] < 1e-4


def test_other_bounds_can_be_set():
    _, metrics = fit(SamplerParity(every_n_iterations=1, max_gap=100.0), engine=Stale())
    assert metrics["sampler/parity_gap_mean"] > 1e-3


def test_without_a_stage_that_samples_before_it():
    module = SPPOModule(make_policy(), make_critic())
    trainer = make_trainer(SamplerParity(), RolloutGeneration(SAMPLING), EvenRows())
    with pytest.raises(InputError, match="list RolloutGeneration first, or remove SamplerParity"):
        trainer.fit(module, KnowsWhatFollows([]))  # type: ignore[arg-type]


def test_supervised_learning_samples_nothing_to_compare():
    trainer = make_trainer(RolloutGeneration(SAMPLING), EvenRows(), SamplerParity())
    with pytest.raises(InputError, match="SFTModule learns from no response .*; remove SamplerParity"):
        trainer.fit(SFTModule(make_policy()), KnowsWhatFollows([]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"every_n_iterations": 0},
            "`SamplerParity.every_n_iterations`=0 leaves nothing to compare; use 1 or more.",
        ),
        ({"prompts": 0}, "`SamplerParity.prompts`=0 leaves nothing to compare; use 1 or more."),
        ({"max_gap": 0.0}, "`SamplerParity.max_gap`=0.0 allows no rounding; use a number above 0."),
    ],
)
def test_settings_that_check_nothing(settings: dict[str, Any], message: str):
    with pytest.raises(InputError) as raised:
        SamplerParity(**settings)
    assert str(raised.value) == message
