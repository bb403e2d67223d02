"""The quickstart's config, killed at random moments and resumed each time, ends as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from kills import different, start, wait

from sppo_lightning.cli import command_line

ROOT = Path(__file__).parents[1]
KILLS, ITERATIONS = 20, 60


def config(folder: Path) -> str:
    """The quickstart's, with a tiny policy from scratch, small batches and a checkpoint after every iteration."""
    found = yaml.safe_load((ROOT / "configs/quickstart/sppo.yaml").read_text())
    words = yaml.safe_load((ROOT / "configs/quickstart/sft.yaml").read_text())["model"]["init_args"]["policy"]
    words["init_args"] |= {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    found["model"]["init_args"] |= {
        "policy": words,
        "critic": {"class_path": "sppo_lightning.models.CharacterCritic", "init_args": {"hidden_size": 16}},
        "mini_batch_size": 8,
    }
    found["data"]["init_args"] |= {"batch_size": 16, "validation_batch_size": 64}
    trainer = found["trainer"]
    trainer.pop("max_time")
    trainer |= {"max_steps": 2 * ITERATIONS, "val_check_interval": 15, "default_root_dir": str(folder)}
    kept = ("InitialValidation", "RolloutGeneration", "ExactMatch", "SampleLog", "Checkpoint")
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].split(".")[-1] in kept]
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith("InitialValidation"):
            callback.pop("init_args")
        if callback["class_path"].endswith("Checkpoint"):
            callback["init_args"] = {"every_n_train_steps": 2}
    return yaml.safe_dump(found)


def fit(folder: Path) -> None:
    """As `python -m sppo_lightning fit --config … --ckpt_path last`."""
    cli = command_line(["fit", "--config", config(folder), "--ckpt_path=last"])
    torch.save(cli.model.state_dict(), folder / "weights.pt")


def newest(folder: Path) -> set[str]:
    """The checkpoints that are there."""
    return {path.name for path in folder.glob("checkpoints/epoch*")}


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    assert wait(start(lambda: fit(undisturbed))) == 0
    iteration = (time.monotonic() - began) / ITERATIONS
    moments = random.Random(0)
    for _ in range(KILLS):
        before = newest(killed)
        child = start(lambda: fit(killed))
        if moments.random() < 0.75:  # others die before they have come to anything
            while newest(killed) == before:
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 2 * iteration))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
    assert wait(start(lambda: fit(killed))) == 0
    expected = torch.load(undisturbed / "weights.pt")
    assert different(expected, torch.load(killed / "weights.pt")) == []
