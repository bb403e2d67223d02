"""Sampling ahead: whose weights sample, what the age of responses costs, and what becomes of the process."""

import copy
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import (
    EvenRows,
    KnowsWhatFollows,
    RecordingSPPO,
    make_batch,
    make_chain_sppo,
    make_critic,
    make_policy,
    make_trainer,
)

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import ExactMatch, RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Engine, HFEngine, Sampling
from sppo_lightning.engines.engine import Response
from sppo_lightning.errors import InputError
from sppo_lightning.off_policy import TruncatedImportance
from sppo_lightning.optim import GroupOptimizer

SAMPLING = Sampling(max_new_tokens=6)
CAP = 1.02


class Remembers(RecordingSPPO):
    """Keeps the policy as it was before each iteration's updates, and the batch."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.before: list[tuple[Any, PromptBatch]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.before.append((copy.deepcopy(self.policy), batch))
        super().training_step(batch, batch_idx)


def fit(*callbacks: Callback, engine: Engine | None = None, iterations: int = 4, **settings: Any) -> Remembers:
    optimizer = GroupOptimizer(lr=0.002, weight_decay=0.0)
    module = Remembers(make_policy(), make_critic(zero=True), policy_optimizer=optimizer, **settings)
    batches = [
        make_batch(module.policy, ["1 + 2 =", "8 8", "4 ; 4", "q r s"], first_row=4 * i) for i in range(iterations)
    ]
    generation = RolloutGeneration(SAMPLING, engine=engine, prefetch=1)
    trainer = make_trainer(generation, EvenRows(), *callbacks, precision="64-true")
    trainer.fit(module, KnowsWhatFollows(batches))  # type: ignore[arg-type]
    return module


@pytest.fixture(scope="module")
def trained() -> Remembers:
    return fit(importance=TruncatedImportance(max_weight=CAP), mini_batch_size=2)


def test_the_weights_of_the_iteration_before_sample(trained: Remembers):
    versions = [batch.rollouts.policy_versions.tolist() for _, batch in trained.before]  # type: ignore[union-attr]
    assert versions == [[0] * 4, [0] * 4, [2] * 4, [4] * 4]
    for iteration, (_, batch) in enumerate(trained.before):
        sampler, _ = trained.before[max(iteration - 1, 0)]
        engine = HFEngine()
        engine.update_weights(sampler, 0)
        expected, rollouts = engine.generate(batch, SAMPLING), batch.rollouts
        assert rollouts is not None
        assert rollouts.responses == expected.responses
        torch.testing.assert_close(rollouts.sampled_log_probs.float(), expected.sampled_log_probs)


def test_gradients_are_weighed_by_the_truncated_ratio_to_the_sampler(trained: Remembers):
    """The first update of each iteration: π is π_old, so only the importance weight differs from 1."""
    weights = []
    for (policy, batch), gradients in zip(trained.before, trained.gradients[::2], strict=True):
        rollouts = batch.rollouts
        assert rollouts is not None
        assert batch.value_logits is not None
        own = policy(rollouts)[0][:2]
        weight = (own - rollouts.sampled_log_probs[:2]).exp().detach()
        mask = rollouts.response_mask[:2]
        weights += weight[mask > 0].tolist()
        advantages = (rollouts.rewards - batch.value_logits.sigmoid())[:2, None]
        loss = -(weight.clamp(max=CAP) * advantages * own * mask).sum() / mask.sum()
        loss.backward()
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(gradients[f"policy.{name}"], parameter.grad, atol=1e-7, rtol=1e-5)
    assert min(weights) < 0.98
    assert max(weights) > CAP  # or nothing would be truncated


class Watches(Callback):
    """Keeps what each iteration logs."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_validation_between_iterations_samples_the_present_weights(greedy: bool):
    module, watches = make_chain_sppo(1e-2), Watches()
    data = PromptDataModule(
        train=ChainTask({"1-3": 1.0}, size=24), validation={"chains": ChainTask({"1-3": 1.0}, size=8)}, batch_size=8
    )
    stages = [RolloutGeneration(Sampling(max_new_tokens=8), greedy=greedy, prefetch=1), ExactMatch(extract="whole")]
    seen: list[tuple[int, set[int], bool]] = []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer: Any, _: Any, __: Any, batch: PromptBatch, *___: Any) -> None:
            assert batch.rollouts is not None
            seen.append((trainer.global_step, set(batch.rollouts.policy_versions.tolist()), trainer.training))

    trainer = make_trainer(*stages, watches, Looks(), max_epochs=2, val_check_interval=1)
    trainer.fit(module, data)
    assert seen == [(step, {step}, False) for step in range(2, 13, 2)]
    assert [m["rollout/staleness_updates"] for m in watches.metrics] == [0, 2, 2, 2, 2, 2]
    assert all(0.5 < m["policy/importance_weight_mean"] < 1.5 for m in watches.metrics[1:])
    assert all(m["policy/importance_truncated_fraction"] < 0.5 for m in watches.metrics)
    assert "sampler/logprob_gap" in watches.metrics[0]


class Dies(HFEngine):
    """Ends its process without a word, in the second batch."""

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        if self.version >= 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().stream(batch, sampling)


class Fails(HFEngine):
    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        if self.version >= 1:
            raise ArithmeticError("no more numbers")
        yield from super().stream(batch, sampling)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (Dies, r"^The process that samples has ended with exit code -9; it was killed, as happens where memory "),
        (Fails, r"(?s)^Sampling failed in its process:.*ArithmeticError: no more numbers"),
    ],
)
def test_what_goes_wrong_in_the_process_ends_the_run(engine: type[Engine], words: str):
    with pytest.raises(RuntimeError, match=words):
        fit(engine=engine())


def test_only_one_iteration_ahead():
    with pytest.raises(InputError) as raised:
        RolloutGeneration(prefetch=2)
    assert str(raised.value) == (
        "`RolloutGeneration.prefetch`=2 would let responses grow older than one iteration; use 1, or 0 to sample "
        "from the present weights."
    )
