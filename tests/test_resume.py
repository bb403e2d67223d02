"""A run that is cut and resumed ends with the weights of the undisturbed one, bit for bit."""

from pathlib import Path

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
    folder: Path, iterations: int, every: int | None = None, ckpt_path: str | None = None
) -> tuple[SPPOModule, Trainer]:
    """Two updates per iteration, three iterations per epoch; a checkpoint after `every` iterations."""
    seed_everything(5, verbose=False)
    module = make_chain_sppo(1e-2, lr_schedule="linear", kl_coef=0.05)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8)
    callbacks = [
        RolloutGeneration(Sampling(max_new_tokens=8)),
        ExactMatch(extract="whole"),
        Brevity(role="shaping", weight=0.1),
        ReferenceRefresh(every_n_updates=3, mix=0.5),
    ]
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
@pytest.mark.parametrize("cut", [2, 3, 4], ids=["mid-epoch", "end of an epoch", "second epoch"])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, cut: int, whole_run: tuple[SPPOModule, Trainer]
) -> None:
    whole, undisturbed = whole_run
    run(tmp_path, cut, every=cut)
    resumed, trainer = run(tmp_path, 7, ckpt_path=str(tmp_path / "cut.ckpt"))
    assert trainer.global_step == undisturbed.global_step == 14
    expected, found = whole.state_dict(), resumed.state_dict()
    assert {name.split(".")[0] for name in expected} == {"policy", "critic", "reference"}
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    moments = [t.optimizers[0].state_dict()["state"] for t in (undisturbed, trainer)]
    for index, entry in moments[0].items():
        for name, value in entry.items():
            assert torch.equal(value, moments[1][index][name]), (index, name)


@pytest.mark.filterwarnings("ignore")
def test_the_weights_move_at_all(tmp_path: Path) -> None:
    first, _ = run(tmp_path, 2, every=2)
    second, _ = run(tmp_path, 3, every=3)
    changed = [n for n, p in first.state_dict().items() if not torch.equal(p, second.state_dict()[n])]
    assert {name.split(".")[0] for name in changed} == {"policy", "critic", "reference"}
