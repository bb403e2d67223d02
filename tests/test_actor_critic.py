"""The critic is asked about the prompts while their responses are sampled."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import AnyDigit, loader, make_batch, make_critic, make_policy, make_token_critic, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.advantages import GAE
from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.engines.engine import Response
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer

PROMPTS = ["1 + 2 =", "8 8", "4 ; 4 ; 4"]


class WaitsForTheCritic(HFEngine):
    """Samples once `asked` is set; keeps the batch."""

    def __init__(self, asked: threading.Event, seconds: float = 60.0) -> None:
        super().__init__()
        self.asked, self.seconds = asked, seconds
        self.batch: PromptBatch | None = None
        self.was_asked = False

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        self.batch = batch
        self.was_asked = self.asked.wait(self.seconds)
        return super().stream(batch, sampling)


def fit(module: SPPOModule, engine: HFEngine, samples: int = 1, **settings: Any) -> Any:
    sampling = Sampling(max_new_tokens=5, samples_per_prompt=samples)
    trainer = make_trainer(RolloutGeneration(sampling, engine=engine), AnyDigit(), **settings)
    trainer.fit(module, loader(make_batch(module.policy, PROMPTS)))  # type: ignore[arg-type]
    return trainer


def asked_by(critic: Any) -> tuple[threading.Event, list[list[str]]]:
    """Set once the critic has answered; and the prompts of each of its forwards."""
    event, forwards = threading.Event(), []

    def note(_: Any, arguments: Sequence[Sequence[Prompt]], __: Any) -> None:
        forwards.append([prompt.text for prompt in arguments[0]])
        event.set()

    critic.register_forward_hook(note)
    return event, forwards


@pytest.mark.parametrize(("precision", "rounding"), [("32-true", 1e-6), ("bf16-mixed", 1e-2)])
def test_v_is_there_when_the_responses_are(precision: str, rounding: float):
    module = SPPOModule(make_policy(), make_critic())
    event, forwards = asked_by(module.critic)
    engine = WaitsForTheCritic(event)
    fit(module, engine, samples=4, precision=precision, max_steps=1)
    assert engine.was_asked
    # one row per prompt, however many responses; then once more with gradient, a row per response
    assert [sorted(prompts) for prompts in forwards] == [sorted(PROMPTS), sorted(PROMPTS * 4)]
    batch = engine.batch
    assert batch is not None
    assert batch.value_logits is not None
    untrained = SPPOModule(make_policy(), make_critic())
    with torch.no_grad():
        expected = [untrained.critic([prompt]).item() for prompt in batch.prompts]  # type: ignore[misc]
    assert batch.value_logits.tolist() == pytest.approx(expected, rel=rounding)
    assert len({round(value, 1) for value in expected}) == 3  # or rows could be mixed up unseen
    in_full = batch.value_logits.tolist() == pytest.approx(expected, rel=1e-6)
    assert in_full == (precision == "32-true")  # the thread rounds as the trainer does


def test_asking_ahead_changes_nothing():
    class AsksLater(SPPOModule):
        def foreseeing(self, batch: PromptBatch) -> Any:
            return contextlib.nullcontext()

    states = []
    for kind in (SPPOModule, AsksLater):
        module = kind(make_policy(), make_critic(), mini_batch_size=3)
        fit(module, HFEngine(), samples=2)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_critic_that_reads_responses_waits_for_them():
    module = SPPOModule(make_policy(), make_token_critic(), advantage=GAE())
    engine = HFEngine()
    fit(module, engine)
    batch = make_batch(module.policy, PROMPTS)  # type: ignore[arg-type]
    with module.foreseeing(batch):
        pass
    assert batch.value_logits is None


def test_what_the_critic_refuses_is_said():
    class Refuses(type(make_critic())):  # type: ignore[misc]
        def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
            raise InputError("These prompts cannot be read.")

    torch.manual_seed(1)
    module = SPPOModule(make_policy(), Refuses())
    with pytest.raises(InputError, match="^These prompts cannot be read.$"):
        fit(module, HFEngine())


def test_an_error_in_sampling_is_not_hidden_by_the_critic():
    class Breaks(HFEngine):
        def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
            raise RuntimeError("no memory")

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="^no memory$"):
        fit(SPPOModule(make_policy(), make_critic()), Breaks())
    assert threading.active_count() == threads


def test_a_batch_that_is_used_again_gets_the_v_of_what_the_critic_has_learned():
    found = []

    class Keeps(SPPOModule):
        def critic_values(self, batch: PromptBatch) -> Any:
            values = super().critic_values(batch)
            found.append(values[0])
            return values

    module = Keeps(make_policy(), make_critic(), critic_optimizer=GroupOptimizer(lr=0.1))
    sampling = Sampling(max_new_tokens=5)
    batches = [make_batch(module.policy, PROMPTS)]  # type: ignore[arg-type]
    make_trainer(RolloutGeneration(sampling), AnyDigit(), max_epochs=2).fit(module, loader(*batches))
    assert len(found) == 2
    assert (found[0] - found[1]).abs().min() > 1e-3
