import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import CASES, assert_equal, stages
from forked import on_ranks
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import AnyDigit, loader, make_batch, make_chain_policy, make_policy, make_trainer
from torch import Tensor

from sppo_lightning import SFTModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.sft import closed


def demonstrations(policy: Any) -> PromptBatch:
    batch = make_batch(policy, list(CASES))
    texts = [rows[0][0].replace("<eos>", "").strip() for rows in CASES.values()]
    batch.prompts = [dataclasses.replace(p, demonstration=t) for p, t in zip(batch.prompts, texts, strict=True)]
    return batch


def by_hand(policy: Any) -> list[Tensor]:
    """Negative log-likelihood of each demonstration's tokens, the end of the sequence included."""
    losses = []
    for prompt, rows in CASES.items():
        ids = policy.tokenizer(prompt)["input_ids"]
        response = policy.tokenizer(rows[0][0].replace("<eos>", ""))["input_ids"] + [policy.tokenizer.eos_token_id]
        logits = policy.model(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    return losses


def sft(budget: int, packed: bool = False) -> tuple[dict[str, Tensor], Any, int]:
    found: list[dict[str, Tensor]] = []
    backwards: list[bool] = []

    class Recording(SFTModule):
        def accumulate(self, loss: Tensor, last: bool) -> None:
            backwards.append(last)
            super().accumulate(loss, last)

        def step_optimizer(self, modules: Any, attempt: Any) -> Any:
            found.append({n: p.grad.clone() for n, p in self.named_parameters()})
            return super().step_optimizer(modules, attempt)

    module = Recording(make_policy(), micro_batch_tokens=budget)
    module.policy.packed = packed
    trainer = make_trainer()
    trainer.fit(module, loader(demonstrations(module.policy)))
    return found[0], trainer, len(backwards)


def test_sft_is_the_mean_cross_entropy_of_the_demonstrations_tokens():
    policy = make_policy()
    loss = torch.cat(by_hand(policy)).mean()
    loss.backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters()}
    # the rows have 14 | 12 12 10 | 7 7 6 6 tokens in 45 at a time; one row of 14 is the width of all eight at once
    paddings = {10_000: 38 / 112, 45: (2 + 2) / (14 + 36 + 28), 1: 0.0}
    for budget, packed, count in ((10_000, False, 1), (45, False, 3), (1, False, 8), (45, True, 2)):
        gradients, trainer, backwards = sft(budget, packed)
        assert backwards == count
        assert_equal(gradients, expected)
        assert float(trainer.callback_metrics["sft/loss"]) == pytest.approx(loss.item(), abs=1e-5)
        padding = float(trainer.callback_metrics["update/padding_fraction"])
        assert padding == pytest.approx(0.0 if packed else paddings[budget], abs=1e-6)
        assert trainer.global_step == 1


def test_sft_needs_demonstrations():
    policy = make_policy()
    with pytest.raises(InputError, match="Row 0 of the data set 'sums' has no demonstration to learn from"):
        make_trainer().fit(SFTModule(policy), loader(make_batch(policy, ["1 +"])))


def test_what_comes_behind_the_end_of_the_sequence_is_not_learned():
    assert closed([5, 6], ends=[1, 2], end=1) == [5, 6, 1]
    assert closed([5, 2, 6, 1], ends=[1, 2], end=1) == [5, 2]


def partly_shown(policy: Any) -> PromptBatch:
    """Every other row has a demonstration."""
    batch = demonstrations(policy)
    pairs = enumerate(batch.prompts)
    batch.prompts = [p if i % 2 else dataclasses.replace(p, demonstration=None) for i, p in pairs]
    return batch


@pytest.mark.parametrize("budget", [10_000, 20])
@pytest.mark.parametrize("sampled", [False, True])
def test_validation_has_the_loss_of_the_demonstrations_beside_the_accuracy(budget: int, sampled: bool):
    module = SFTModule(make_policy(), micro_batch_tokens=budget)
    first, second, third = (loader(make(module.policy)) for make in (demonstrations, partly_shown, unshown))
    trainer = make_trainer(*(stages(CASES) if sampled else []))
    [found, *_] = trainer.validate(module, [first, second, third], verbose=False)
    losses = by_hand(make_policy())
    every, other = torch.cat(losses), torch.cat(losses[1::2])
    expected = {"set0": every.mean(), "set1": other.mean(), "all": torch.cat([every, other]).mean()}
    measured = {name: value for name, value in found.items() if name.endswith("sft_loss")}
    assert measured == pytest.approx({f"val/{n}/sft_loss": v.item() for n, v in expected.items()}, abs=1e-5)
    accuracies = {name for name in found if "avg@" in name}
    assert accuracies == ({f"val/{name}/avg@1" for name in ("set0", "set1", "set2", "all")} if sampled else set())
    [again, *_] = trainer.test(module, [first], verbose=False)
    assert again["val/set0/sft_loss"] == pytest.approx(every.mean().item(), abs=1e-5)


def unshown(policy: Any) -> PromptBatch:
    return make_batch(policy, list(CASES))


def early(folder: Path, kind: str, **settings: Any) -> tuple[Any, EarlyStopping]:
    """A run on few chains that is validated on others after every update, until that gets no better."""
    seed_everything(1, verbose=False)
    module = SFTModule(make_chain_policy(), GroupOptimizer(lr=0.03))
    few = ChainTask({"1-3": 1.0}, 8, demonstrations=True)
    others = ChainTask({"1-3": 1.0}, 16, split="validation", demonstrations=True)
    data = PromptDataModule(few, {"held_out": others}, batch_size=4)
    stages = [RolloutGeneration(Sampling(max_new_tokens=4, samples_per_prompt=2)), AnyDigit()]
    stopping = EarlyStopping(f"val/held_out/{kind}", mode="min" if kind == "sft_loss" else "max", patience=3)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    limits = {"max_epochs": 100, "val_check_interval": 1, "check_val_every_n_epoch": None}
    callbacks = [*([] if kind == "sft_loss" else stages), stopping, saver]
    trainer = make_trainer(*callbacks, **limits, enable_checkpointing=True)
    trainer.fit(module, data, **settings)
    return trainer, stopping


@pytest.mark.parametrize("kind", ["sft_loss", "avg@2"])
def test_a_run_stops_when_it_gets_no_better_and_a_resumed_one_stops_there_too(tmp_path: Path, kind: str):
    trainer, stopping = early(tmp_path / "first", kind)
    stopped = trainer.global_step
    assert stopping.stopped_epoch > 0
    assert stopping.wait_count == 3
    assert 5 < stopped < 200
    final = float(trainer.callback_metrics[stopping.monitor])
    for since in (stopped - 5, stopped - 2):  # before the best, and while the patience is running out
        checkpoint = str(tmp_path / "first" / f"step={since}.ckpt")
        resumed, again = early(tmp_path / f"from{since}", kind, ckpt_path=checkpoint)
        assert (resumed.global_step, again.wait_count) == (stopped, 3)
        assert float(again.best_score) == float(stopping.best_score)
        assert float(resumed.callback_metrics[stopping.monitor]) == final


def losses_over_ranks(devices: int, strategy: str, batch_size: int) -> dict[str, float]:
    """What two updates and a validation say whose last batches leave a rank without rows, or all without any."""
    seed_everything(5, verbose=False)
    module = SFTModule(make_chain_policy(), GroupOptimizer(lr=0.01), micro_batch_tokens=24)
    data = PromptDataModule(
        ChainTask({"1-3": 1.0}, 12, demonstrations=True),
        {
            "few": ChainTask({"1-3": 1.0}, 3, split="validation", demonstrations=True),
            "none": ChainTask({"1-2": 1.0}, 3, split="validation"),
        },
        batch_size=6,
        validation_batch_size=batch_size,
        shuffle=False,
    )
    spread = ModelParallelStrategy(tensor_parallel_size=1) if strategy == "fsdp" else strategy
    trainer = make_trainer(devices=devices, strategy=spread, max_steps=2, log_every_n_steps=1)
    trainer.fit(module, data)
    return {
        name: float(value) for name, value in trainer.callback_metrics.items() if "/loss" in name or "val" in name
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_losses_do_not_depend_on_the_ranks(tmp_path: Path, strategy: str):
    alone = losses_over_ranks(1, "auto", 3)
    assert set(alone) == {"sft/loss", "val/few/sft_loss", "val/all/sft_loss"}
    assert alone["val/few/sft_loss"] == alone["val/all/sft_loss"]
    for found in on_ranks(2, tmp_path, losses_over_ranks, 2, strategy, 2):
        assert found == pytest.approx(alone, abs=1e-5)
