"""SIGTERM: the run saves what is exact, and ends with status 143."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import Run, Signals, assert_undisturbed, outcome
from tiny_config import EXACT, ROLLOUT, write_files

TERM = signal.SIGTERM
ENDED = 128 + TERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"))
    assert outcome(run) == 0
    return run


# a call of the verifier is an iteration or a validation: one before the first iteration, others after 5, 10 …
@pytest.mark.parametrize(
    ("call", "kept"),
    [
        pytest.param(1, set(), marks=pytest.mark.slow),
        (2, set()),
        (9, {"epoch=2-step=12.ckpt", "last.ckpt"}),
        pytest.param(13, {"epoch=3-step=20.ckpt", "last.ckpt"}, marks=pytest.mark.slow),
    ],
    ids=["first validation", "first iteration", "seventh iteration", "validation after the tenth"],
)
def test_what_has_learned_nothing_ends_at_once_and_is_repeated(
    tmp_path: Path, whole: Run, call: int, kept: set[str]
) -> None:
    run, began = Run(tmp_path, every=1000), time.monotonic()
    assert outcome(dataclasses.replace(run, stalls_at=call)) == ENDED
    assert time.monotonic() - began < 30
    assert run.checkpoints == kept
    assert outcome(run) == 0
    assert_undisturbed(run, whole)


def test_updates_are_finished(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path, every=1000)
    # at both updates of the iteration, the second time in vain
    assert outcome(lambda: run(Signals(TERM, 6, "on_before_optimizer_step"))) == ENDED
    assert run.checkpoints == {"epoch=1-step=12.ckpt", "last.ckpt"}
    # and in the first iteration behind it, at the end of which the epoch has begun
    assert outcome(lambda: run(Signals(TERM, 7, "on_before_optimizer_step"))) == ENDED
    assert run.checkpoints == {"epoch=1-step=12.ckpt", "epoch=2-step=14.ckpt", "last.ckpt"}
    assert outcome(run) == 0
    assert_undisturbed(run, whole)


@pytest.mark.slow
def test_what_was_sampled_ahead_is_learned_from(tmp_path: Path) -> None:
    whole, run = (Run(tmp_path / name, every=1000, prefetch=1) for name in ("whole", "run"))
    assert outcome(whole) == 0
    assert outcome(dataclasses.replace(run, stalls_at=9)) == ENDED
    assert run.checkpoints == {"epoch=2-step=12.ckpt", "last.ckpt"}
    assert outcome(run) == 0
    assert_undisturbed(run, whole)


@pytest.mark.slow
def test_ranks_agree_on_a_signal_that_reaches_one(tmp_path: Path) -> None:
    whole, run = (Run(tmp_path / name, every=1000, devices=2) for name in ("whole", "run"))
    assert outcome(whole) == 0
    # the launcher of forks reports that rank 0 has ended
    assert outcome(lambda: run(Signals(TERM, 6, "on_before_optimizer_step", rank=1))) == 1
    assert run.checkpoints == {"epoch=1-step=12.ckpt", "last.ckpt"}
    assert outcome(run) == 0
    assert_undisturbed(run, whole)


@pytest.mark.slow
def test_the_command_line_ends_with_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saver = {"class_path": "sppo_lightning.callbacks.Checkpoint"}
    trainer = {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, saver]}
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_epochs": 100000}
    write_files(trainer | two)
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", "config.yaml", "--ckpt_path=last"]
    for _ in range(2):
        before = set(Path("run").glob("checkpoints/*"))
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
        while set(Path("run").glob("checkpoints/*")) == before:
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == ENDED
