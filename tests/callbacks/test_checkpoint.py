"""Checkpoint keeps what is there where nothing more can be written, and finds what a run goes on from."""

import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from kills import Run, Signals, assert_undisturbed, outcome, scalars
from lightning.pytorch import Callback, Trainer


class NoRoom(Callback):
    """From one iteration on, until another, no file may become larger than some bytes."""

    def __init__(self, size: int, iterations: range) -> None:
        self.size, self.iterations = size, iterations

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = trainer.fit_loop.total_batch_idx + 1 in self.iterations
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if full else most, most))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"))
    assert outcome(run) == 0
    return run


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    tmp_path: Path, whole: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, every=8)
    # after 4, 8, 12 … iterations and each validation; it dies in the 15th
    dies = Signals(signal.SIGKILL, 15, "on_train_batch_start")
    assert outcome(lambda: run(NoRoom(100_000, range(8, 13)), dies)) == -signal.SIGKILL
    said = capfd.readouterr().err
    assert re.findall(r"NO CHECKPOINT at update (\d+)", said) == ["16", "20", "24"]
    assert "The run goes on without it" in said
    assert run.checkpoints == {"epoch=1-step=8.ckpt", "epoch=1-step=10.ckpt", "last.ckpt"}
    failures = {step: values for (name, step), values in scalars(tmp_path).items() if name == "checkpoint/failures"}
    assert failures[6] == {0.0}
    assert failures[13] == {3.0}
    assert outcome(run) == 0
    assert run.checkpoints == {"epoch=5-step=32.ckpt", "epoch=6-step=40.ckpt", "last.ckpt"}
    found, expected = scalars(tmp_path), scalars(whole.folder)
    assert found.keys() == expected.keys()


def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, whole: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    assert outcome(lambda: run(Signals(signal.SIGKILL, 12, "on_train_batch_start"))) == -signal.SIGKILL
    name = tmp_path / "checkpoints/epoch=3-step=20.ckpt"
    name.write_bytes(name.read_bytes()[:-1000])
    capfd.readouterr()
    assert outcome(run) == 0  # from the beginning, for there is no other
    assert f"The checkpoint {name} is torn and passed over (its end is missing); there is no other." in (
        capfd.readouterr().err
    )
    assert_undisturbed(run, whole)
