"""Folders that cannot be written: told before the run begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import no_file_above
from tiny_config import EXACT, ROLLOUT

ROOT = "trainer.default_root_dir"


def logger_to(folder: str) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder}}


def keeper_to(folder: str) -> dict[str, Any]:
    return {"class_path": "sppo_lightning.callbacks.Checkpoint", "init_args": {"dirpath": folder}}


# nobody can make a folder in /proc, not even root
OF_THE_OUTPUT = {
    "no folder can be made": (
        {ROOT: "/proc/run"},
        "`trainer.default_root_dir`=/proc/run cannot be written (No such file or directory); choose another folder.",
    ),
    "of a logger": (
        {"trainer.logger": logger_to("/proc/run")},
        "`save_dir` of `CSVLogger`=/proc/run cannot be written (No such file or directory); choose another folder.",
    ),
    "of checkpoints": (
        {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, keeper_to("/proc/run")]},
        "`dirpath` of `Checkpoint`=/proc/run cannot be written (No such file or directory); choose another folder.",
    ),
    "a file in its place": (
        {ROOT: "train.jsonl/run"},
        "`trainer.default_root_dir`=train.jsonl/run cannot be written: <here>/train.jsonl is a file; name a folder.",
    ),
}


@pytest.mark.parametrize("case", OF_THE_OUTPUT)
def test_a_folder_that_cannot_be_written(refused: Callable[..., str], case: str):
    changes, sentence = OF_THE_OUTPUT[case]
    assert refused(changes) == sentence


def test_no_space_left(refused: Callable[..., str]):
    with no_file_above(2**15):
        said = refused()
    assert said == "`trainer.default_root_dir`=run cannot be written (File too large); choose another folder."
    assert not Path("run").exists()
