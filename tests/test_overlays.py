"""Several config files on one command line: a whole one and what stands on top of it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_config import write_files
from torch import Tensor

from sppo_lightning.advantages import Advantage
from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import Verifier
from sppo_lightning.cli import command_line, main
from sppo_lightning.experience import Outcomes

OVERLAY = f"""
model:
  init_args:
    critic: null
    advantage: {{class_path: {__name__}.RewardAlone}}
    mini_batch_size: 6
trainer:
  callbacks:
    - class_path: {__name__}.Watch
    - class_path: {__name__}.Half
    - class_path: sppo_lightning.callbacks.RolloutGeneration
      init_args:
        sampling: {{samples_per_prompt: 3}}
"""


class RewardAlone(Advantage):
    """`A = R`, without a critic."""

    def __call__(self, outcomes: Outcomes) -> Tensor:
        return outcomes.rewards


class Half(Verifier):
    """Scores every response 0.5."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [0.5] * len(responses)


class Watch(Callback):
    """Keeps each iteration's number of responses."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        self.seen.append(len(batch.rollouts or []))


@pytest.fixture(autouse=True)
def _two_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    write_files({})
    Path("overlay.yaml").write_text(OVERLAY)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--print_config"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_a_run_with_an_overlay_and_settings_on_top():
    cli = command_line(["fit", "--config", "config.yaml", "--config=overlay.yaml", "--model.micro_batch_tokens=64"])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names[:4] == ["RolloutGeneration", "ExactMatch", "Half", "Watch"]
    rollout, *_, watch = cli.trainer.callbacks[:4]
    assert (rollout.sampling.samples_per_prompt, rollout.sampling.max_new_tokens) == (3, 2)
    assert watch.seen == [12]  # 4 prompts
    assert cli.trainer.global_step == 2  # mini-batches of 6
    assert cli.trainer.callback_metrics["reward/half"] == 0.5
    assert cli.model.critic is None
    assert cli.model.micro_batch_tokens == 64
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["init_args"]["critic"] is None
    assert saved["model"]["init_args"]["micro_batch_tokens"] == 64
    assert saved["trainer"]["callbacks"][0]["init_args"]["sampling"]["samples_per_prompt"] == 3


def test_the_printed_config_is_the_merged_one(capsys: pytest.CaptureFixture[str]):
    whole = printed(capsys, "fit", "--config", "config.yaml", "--config=overlay.yaml")
    Path("whole.yaml").write_text(whole)
    assert printed(capsys, "fit", "-c", "whole.yaml") == whole
    callbacks = yaml.safe_load(whole)["trainer"]["callbacks"]
    assert [entry["class_path"].rpartition(".")[2] for entry in callbacks] == [
        "RolloutGeneration",
        "ExactMatch",
        "Half",
        "Watch",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config=config.yaml", "--config", "overlay.yaml", "--model.mini_batch_size=4"],
        ["fit", "--model.mini_batch_size=4", "-c", "config.yaml", "-c=overlay.yaml"],
        ["fit", "-cconfig.yaml", "--model.mini_batch_size=4", f"--config={OVERLAY}"],
        ["--config=config.yaml", "fit", "--model.mini_batch_size", "4", "--config", "overlay.yaml"],
    ],
)
def test_the_order_of_files_counts_and_settings_win_wherever_they_stand(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    settings = yaml.safe_load(printed(capsys, *arguments))["model"]["init_args"]
    assert settings["mini_batch_size"] == 4
    assert settings["critic"] is None


def test_the_later_file_wins(capsys: pytest.CaptureFixture[str]):
    settings = yaml.safe_load(printed(capsys, "fit", "-c", "overlay.yaml", "-c", "config.yaml"))
    assert settings["model"]["init_args"]["critic"]["class_path"] == "sppo_lightning.models.PromptCritic"
    assert settings["model"]["init_args"]["mini_batch_size"] == 6


def test_files_without_a_command_ask_for_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--config", "config.yaml"])
    assert capsys.readouterr().err == (
        "error: Say which of fit, validate, test, predict, export to run, as in `python -m sppo_lightning fit --config …`.\n"
    )
