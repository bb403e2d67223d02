"""A run that is cut and resumed ends with the weights of the undisturbed one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import make_chain_sppo, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import ExactMatch, ReferenceRefresh, RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.models import LoRA
from sppo_lightning.replay import CriticReplay
from sppo_lightning.shrinkage import ShrunkSequenceAdvantage


class StopAfter(Callback):
    """Ends the run early; its settings stay those of the whole run, as after a kill."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= 2 * self.iterations


class Brevity(Verifier):
    """A shaping score, whose running mean a resumed run must remember."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [-float(len(response.split())) for response in responses]


def run(
    folder: Path,
    iterations: int,
    every: int | None = None,
    ckpt_path: str | None = None,
    lora: LoRA | None = None,
    prefetch: int = 0,
    **settings: Any,
) -> tuple[SPPOModule, Trainer]:
    """Two updates per iteration, three iterations per epoch; a checkpoint after `every` iterations."""
    seed_everything(5, verbose=False)
    module = make_chain_sppo(1e-2, lora, lr_schedule="linear", kl_coef=0.05, **settings)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8)
    callbacks: list[Callback] = [
        RolloutGeneration(Sampling(max_new_tokens=8), prefetch=prefetch),
        ExactMatch(extract="whole"),
        Brevity(role="shaping", weight=0.1),
    ]
    if lora is None:
        callbacks.append(ReferenceRefresh(every_n_updates=3, mix=0.5))
    if every is not None:
        callbacks.append(StopAfter(iterations))
        callbacks.append(ModelCheckpoint(folder, "cut", every_n_train_steps=2 * every, save_top_k=-1))
    trainer = make_trainer(
        *callbacks, max_steps=14, max_epochs=-1, limit_val_batches=0, enable_checkpointing=every is not None
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SPPOModule, Trainer]:
    return run(tmp_path_factory.mktemp("whole"), 7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cut", "lora"),
    [(2, None), (3, None), (4, None), (2, LoRA(rank=2))],
    ids=["mid-epoch", "end of an epoch", "second epoch", "lora"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, cut: int, lora: LoRA | None, whole_run: tuple[SPPOModule, Trainer]
) -> None:
    whole, undisturbed = run(tmp_path, 7, lora=lora) if lora else whole_run
    run(tmp_path, cut, every=cut, lora=lora)
    resumed, trainer = run(tmp_path, 7, ckpt_path=str(tmp_path / "cut.ckpt"), lora=lora)
    assert trainer.global_step == undisturbed.global_step == 14
    expected, found = whole.state_dict(), resumed.state_dict()
    own_reference = set() if lora else {"reference"}
    assert {name.split(".")[0] for name in expected} == {"policy", "critic"} | own_reference
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    moments = [t.optimizers[0].state_dict()["state"] for t in (undisturbed, trainer)]
    for index, entry in moments[0].items():
        for name, value in entry.items():
            assert torch.equal(value, moments[1][index][name]), (index, name)


def with_memory() -> dict[str, Any]:
    """A baseline that keeps a record of its prompts, and a critic that sees half as many stored ones again."""
    return {
        "advantage": ShrunkSequenceAdvantage(decay=0.5),
        "critic_replay": CriticReplay(capacity=20, ratio=0.5, half_life_iterations=2.0),
    }


@pytest.mark.filterwarnings("ignore")
def test_what_the_baseline_and_the_critic_remember_goes_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, 7, **with_memory())
    run(tmp_path, 4, every=4, **with_memory())
    # plain types, which load without the right to run code
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert len(checkpoint["advantage"]["records"]) == 24  # every prompt of the first epoch
    resumed, _ = run(tmp_path, 7, ckpt_path=str(tmp_path / "cut.ckpt"), **with_memory())
    expected, found = whole.state_dict(), resumed.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert vars(whole.advantage) == vars(resumed.advantage)
    assert whole.critic_replay is not None
    assert resumed.critic_replay is not None
    assert vars(whole.critic_replay) == vars(resumed.critic_replay)
    assert (whole.critic_replay.iteration, len(whole.critic_replay.stored)) == (7, 20)
    for forgotten in ("advantage", "critic_replay"):  # each of them matters
        less = {name: value for name, value in checkpoint.items() if name != forgotten}
        torch.save(less, tmp_path / "less.ckpt")
        other, _ = run(tmp_path, 7, ckpt_path=str(tmp_path / "less.ckpt"), **with_memory())
        assert any(not torch.equal(expected[name], value) for name, value in other.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_was_sampled_ahead_goes_on(tmp_path: Path, whole_run: tuple[SPPOModule, Trainer]) -> None:
    whole, _ = run(tmp_path, 7, prefetch=1)
    run(tmp_path, 3, every=3, prefetch=1)
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)  # plain types
    [ahead] = checkpoint["callbacks"]["RolloutGeneration"]["sampled"]
    assert {response["policy_version"] for response in ahead["sampled"]["responses"]} == {4}  # of 6 updates
    resumed, _ = run(tmp_path, 7, ckpt_path=str(tmp_path / "cut.ckpt"), prefetch=1)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    on_policy = whole_run[0].state_dict()
    assert any(not torch.equal(expected[name], on_policy[name]) for name in expected)


@pytest.mark.filterwarnings("ignore")
def test_the_weights_move_at_all(tmp_path: Path) -> None:
    first, _ = run(tmp_path, 2, every=2)
    second, _ = run(tmp_path, 3, every=3)
    changed = [n for n, p in first.state_dict().items() if not torch.equal(p, second.state_dict()[n])]
    assert {name.split(".")[0] for name in changed} == {"policy", "critic", "reference"}
