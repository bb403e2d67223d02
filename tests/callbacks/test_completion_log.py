"""What CompletionLog leaves on the disk, read as anyone would read it."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from limits import no_file_above
from tiny_run import ByRow, Recorder, Words, data, sft, sppo, stages, trainer_of
from toy_pipeline import rollouts_of

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt, Scores
from sppo_lightning.callbacks import CompletionLog, Verifier
from sppo_lightning.callbacks.completion_log import learned_rows
from sppo_lightning.data import CompletionSource, PromptDataModule
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Experience


class Unsure(Verifier):
    """No verdict on odd rows, and a score that only every other iteration has."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [None if prompt.row % 2 else float("a" in r) for prompt, r in zip(prompts, responses, strict=True)]


class Watches(Callback):
    """What the updates used, and what the checkpointed critic says before and after them."""

    def __init__(self) -> None:
        self.used: list[Experience] = []
        self.before: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(pl_module.critic(batch.prompts).detach().sigmoid())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.used.append(outputs["experience"])


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows, by `datasets`, in the order of the shards' names."""
    return datasets.load_dataset(
        "parquet", data_files=f"{folder}/log/*.parquet", split="train", cache_dir=str(folder / "cache")
    ).to_list()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "log").iterdir())


def run(folder: Path, *more: Callback, fit: dict[str, Any] | None = None, **settings: Any) -> SPPOModule:
    """Four iterations of eight responses, in two updates each."""
    module = sppo(folder / "tokenizer")
    log = CompletionLog(str(folder / "log"), **settings)
    trainer = trainer_of([*stages(Unsure()), *more, log], enable_checkpointing=bool(fit))
    trainer.fit(module, data(validation=()), **(fit or {}))
    return module


def test_every_response_is_a_row_with_what_the_updates_used(tmp_path: Path):
    watches = Watches()
    run(tmp_path, watches)
    rows = read(tmp_path)
    assert [row["iteration"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    assert {row["policy_version"] for row in rows[24:]} == {6}  # three iterations of two updates
    for i, (experience, values) in enumerate(zip(watches.used, watches.before, strict=True)):
        for row, prompt, response, value in zip(
            rows[8 * i :], experience.rollouts.prompts, experience.rollouts.responses, values, strict=False
        ):
            known = prompt.row % 2 == 0
            assert (row["dataset"], row["row"], row["prompt"]) == ("train", prompt.row, prompt.text)
            assert (row["response"], row["gold"]) == (response, "a")
            assert row["reward"] == row["score/unsure"] == (float("a" in response) if known else None)
            assert row["value"] == pytest.approx(float(value), abs=1e-6)
            assert row["advantage"] == (pytest.approx(row["reward"] - row["value"], abs=1e-6) if known else None)
    tokens = [int(n) for experience in watches.used for n in experience.rollouts.response_mask.sum(1)]
    assert [row["response_tokens"] for row in rows] == tokens
    assert {row["value"] for row in rows[:8]} == {0.5}
    assert 0.5 not in {row["value"] for row in rows[8:]}


def test_advantages_of_tokens_are_averaged_over_the_response():
    rollouts = rollouts_of(["one", "two"])
    rollouts.response_mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    rollouts.scores["judge"] = Scores(torch.tensor([1.0, 0.0]), 1.0, "outcome")
    advantages = torch.tensor([[1.0, 2.0, 9.0], [-1.0, -2.0, -6.0]])
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    rows = learned_rows(Experience(rollouts, rollouts.rewards, advantages, torch.ones(2).bool(), values), 7)
    assert [(row["iteration"], row["advantage"], row["reward"]) for row in rows] == [(7, 1.5, 1.0), (7, -3.0, 0.0)]
    assert [row["value"] for row in rows] == pytest.approx([0.1, 0.4])
    without = learned_rows(Experience(rollouts, rollouts.rewards, advantages, torch.ones(2).bool()), 7)
    assert [row["value"] for row in without] == [None, None]


def test_the_oldest_go_first(tmp_path: Path):
    run(tmp_path / "all")
    sizes = [file.stat().st_size for file in sorted((tmp_path / "all/log").iterdir())]
    last = [f"iteration-{i:06d}.rank0.parquet" for i in (1, 2, 3, 4)]
    assert names(tmp_path / "all") == last
    run(tmp_path / "few", max_iterations=2)
    assert names(tmp_path / "few") == last[2:]
    run(tmp_path / "exactly", max_bytes=sum(sizes[1:]))
    assert names(tmp_path / "exactly") == last[1:]
    run(tmp_path / "small", max_bytes=1)
    assert names(tmp_path / "small") == last[3:]
    run(tmp_path / "every", every_n_iterations=3)
    assert names(tmp_path / "every") == [last[0], last[3]]


@pytest.mark.filterwarnings("ignore")
def test_each_rank_has_its_own(tmp_path: Path):
    module = sppo(tmp_path / "tokenizer")
    module.configure_model()  # before the fork
    callbacks = [*stages(), CompletionLog(str(tmp_path / "log"), max_iterations=3)]
    trainer_of(callbacks, devices=2, strategy="ddp_fork").fit(module, data(validation=()))
    assert names(tmp_path) == [f"iteration-{i:06d}.rank{rank}.parquet" for i in (2, 3, 4) for rank in (0, 1)]
    rows = read(tmp_path)
    assert sorted(row["row"] for row in rows) == sorted({row["row"] for row in rows})  # each prompt once
    assert len(rows) == 24
    # one process begins anew in the folder, and removes the other's shards too
    trainer_of([*stages(), CompletionLog(str(tmp_path / "log"))]).fit(sppo(tmp_path / "tokenizer"), data(()))
    assert names(tmp_path) == [f"iteration-{i:06d}.rank0.parquet" for i in (1, 2, 3, 4)]


class Killed(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 3:
            raise KeyboardInterrupt("the machine goes away")


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_leaves_each_iteration_once(tmp_path: Path):
    run(tmp_path / "whole")
    keeper = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=4, save_top_k=-1)
    cut = tmp_path / "cut"
    with pytest.raises(SystemExit):
        run(cut, Killed(), keeper, fit={"ckpt_path": None})
    draft = cut / "log" / ".iteration-000004.rank0.parquet.1"
    draft.write_text("half")
    for stale in ("iteration-000009.rank0.parquet", "iteration-000009.rank3.parquet", "notes.txt"):
        (cut / "log" / stale).write_text("stale")
    run(cut, keeper, fit={"ckpt_path": str(tmp_path / "kept/step=4.ckpt"), "weights_only": True})
    assert names(cut) == [*(f"iteration-{i:06d}.rank0.parquet" for i in (1, 2, 3, 4)), "notes.txt"]
    assert read(cut) == read(tmp_path / "whole")


def test_a_run_that_starts_anew_says_what_it_removes(tmp_path: Path):
    run(tmp_path)
    with pytest.warns(UserWarning, match="CompletionLog has removed 4 files of an earlier run from "):
        run(tmp_path, every_n_iterations=4)
    assert names(tmp_path) == ["iteration-000001.rank0.parquet"]


class Hostile(Callback):
    """Replaces the responses after they were scored; every other iteration loses its scores."""

    text = "a\x00\ud83d b\udc00 \ud83d\ude00 \u202e\r\n"

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.rollouts.responses[:] = [self.text] * len(batch.rollouts)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx % 2:
            outputs["experience"].rollouts.scores.clear()


def test_hostile_text_and_missing_scores_have_the_same_columns(tmp_path: Path):
    run(tmp_path, Hostile())
    rows = read(tmp_path)
    assert {row["response"] for row in rows} == {"a\x00\ufffd b\ufffd \U0001f600 \u202e\r\n"}
    assert {row["score/unsure"] is None for row in rows[8:16]} == {True}
    assert {row["score/unsure"] is None for row in rows[16:24]} == {True, False}


class FullDisk(Callback):
    """For the second iteration's shard alone."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.full = no_file_above(100)
        if trainer.fit_loop.total_batch_idx == 1:
            self.full.__enter__()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 2:
            self.full.__exit__(None, None, None)


def test_a_full_disk_ends_no_run(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"CompletionLog could not write to .*large.*training goes on"):
        run(tmp_path, FullDisk())
    assert names(tmp_path) == [f"iteration-{i:06d}.rank0.parquet" for i in (1, 3, 4)]
    assert len(read(tmp_path)) == 24


def test_supervised_learning_has_nothing_to_log(tmp_path: Path):
    trainer_of([CompletionLog(str(tmp_path / "log"))]).fit(sft(), data(validation=()))
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["every_n_iterations", "max_iterations", "max_bytes"])
def test_a_setting_that_keeps_nothing(name: str):
    with pytest.raises(InputError, match=f"`CompletionLog.{name}`=0 keeps nothing; use 1 or more."):
        CompletionLog(**{name: 0})


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "log").write_text("a file")
    with pytest.raises(InputError, match=r"`CompletionLog.path`='.*log' cannot be made \(.*exists.*\)"):
        run(tmp_path)


def test_supervised_learning_goes_on_from_the_good_ones(tmp_path: Path):
    """Rejection-sampling fine-tuning: the prompts as the policy has read them, and what it has answered."""
    log = CompletionLog(str(tmp_path / "log"))
    drawn = PromptDataModule(Words(32), batch_size=32, suffix=" h")
    reinforced = sppo(tmp_path / "tokenizer", learning_rate=0.0)
    trainer_of([*stages(ByRow(lambda row: float(row % 2))), log], max_epochs=4).fit(reinforced, datamodule=drawn)
    rows = [
        row for row in read(tmp_path) if row["reward"] == 1.0 and row["finish_reason"] == "stop" and row["response"]
    ]
    expected = {(row["prompt"], row["response"]) for row in rows}
    assert len(expected) > 1
    assert all(prompt.endswith(" h") for prompt, _ in expected)
    source = CompletionSource(str(tmp_path / "log"))
    own = PromptDataModule(source, batch_size=len(source.rows()), suffix=" h")
    module, recorder = sft(), Recorder()
    trainer_of([recorder], max_epochs=8).fit(module, datamodule=own)
    assert {(prompt.text, prompt.demonstration) for prompt in own.prompts()} == expected
    losses = [metrics["sft/loss"] for metrics in recorder.iterations]
    assert losses == sorted(losses, reverse=True)
