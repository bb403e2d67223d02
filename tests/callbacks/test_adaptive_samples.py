"""More responses where the critic is unsure: on one rank or two, after a resume, ahead or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import check_same, run
from lightning.pytorch import Callback, LightningModule, Trainer
from scripted_run import Scripted
from tiny import make_chain_sppo, make_critic, make_trainer
from tiny_run import data, sppo, trainer_of

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import AdaptiveSamples, DynamicSampling, RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PassRateCurriculum, PromptDataModule
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.pooling import PooledAdvantage
from sppo_lightning.uncertainty import CriticVariance, RecordVariance


class Notes(Callback):
    """Writes down each iteration's responses on this rank, and keeps what was logged and learned from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logged: list[dict[str, float]] = []
        self.batches: list[PromptBatch] = []
        self.experiences: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert batch.rollouts is not None
        keys = [
            (prompt.row, batch.visits[batch.rollouts.prompt_index[i]])
            for i, prompt in enumerate(batch.rollouts.prompts)
        ]
        with (self.folder / f"{trainer.world_size}-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(
                json.dumps([[*key, text] for key, text in zip(keys, batch.rollouts.responses, strict=True)]) + "\n"
            )
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.batches.append(batch)
        self.experiences.append(outputs["experience"])


def responses(folder: Path, ranks: int = 1) -> list[list[Any]]:
    """Sorted rows, visits and responses of each iteration, over all ranks."""
    parts = [(folder / f"{ranks}-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    return [sorted(entry for line in lines for entry in json.loads(line)) for lines in zip(*parts, strict=True)]


def adaptive(
    folder: Path, ranks: int = 1, steps: int = 10, stage: Any = None, **settings: Any
) -> tuple[Any, Notes]:
    """A run on the chain task whose budget is worth about two responses per prompt."""
    notes, stage = Notes(folder), stage or AdaptiveSamples(budget_tokens=100, max_samples=4)
    chosen: dict[str, Any] = {"advantage": PooledAdvantage(running_decay=0.5)} | settings
    return run(ranks, chosen.pop("silent", 0), None, steps, stage, notes, **chosen), notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("silent", [0, 2], ids=["all judged", "one rank without verdicts"])
def test_two_processes_do_what_one_does(tmp_path: Path, silent: int) -> None:
    found = {}
    for ranks in (1, 2):
        stage = AdaptiveSamples(100, 4, RecordVariance())
        found[ranks], _ = adaptive(tmp_path, ranks, stage=stage, silent=silent)
    check_same(found[1], found[2])
    one, two = responses(tmp_path), responses(tmp_path, 2)
    assert one == two
    assert len(one) == 5
    assert all(8 < len(iteration) <= 32 for iteration in one)
    for name, value in found[1][1].items():
        if name.startswith("adaptive/"):
            assert found[2][1][name] == pytest.approx(value, abs=1e-6), name
    by_rank = [
        json.loads(line) for rank in range(2) for line in (tmp_path / f"2-{rank}.jsonl").read_text().splitlines()
    ]
    assert any(len(first) != len(second) for first, second in zip(by_rank[:5], by_rank[5:], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path, prefetch: int) -> None:
    def part(name: str, steps: int, folder: Path | None = None, **settings: Any) -> tuple[Any, list[Any]]:
        (tmp_path / name).mkdir()
        stages = AdaptiveSamples(100, 4, RecordVariance()), Notes(tmp_path / name)
        advantage = PooledAdvantage(running_decay=0.5)
        found = run(1, 0, folder, steps, *stages, advantage=advantage, prefetch=prefetch, **settings)
        return found, responses(tmp_path / name)

    (whole, metrics), seen = part("whole", 10)
    _, first = part("cut", 6, tmp_path)
    (resumed, again), second = part("resumed", 10, ckpt_path=str(tmp_path / "1.ckpt"))
    assert first + second == seen
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    for name, value in metrics.items():
        if name.split("/")[0] in ("adaptive", "policy", "critic", "reward"):
            assert again[name] == pytest.approx(value, nan_ok=True), name
    assert metrics["critic/prior_strength"] != 4.0
