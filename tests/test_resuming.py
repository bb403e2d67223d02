"""A run that was killed and resumed is the undisturbed one."""

import signal
from pathlib import Path

import pytest
import torch
from kills import Run, Signals, SignalsLast, assert_undisturbed, different, outcome, scalars

KILL = signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"))
    assert outcome(run) == 0
    logged = scalars(run.folder)
    assert {step for name, step in logged if name == "policy/loss"} == set(range(20))
    assert {step for name, step in logged if name == "val/few/avg@1"} == {0, 4, 9, 14, 19}
    return run


@pytest.mark.parametrize(
    "death",
    [
        SignalsLast(KILL, 10, "on_train_batch_end"),
        Signals(KILL, 10, "on_validation_start"),
        Signals(KILL, 12, "on_train_batch_start"),
    ],
    ids=["before the iteration is logged", "before its validation", "two iterations later"],
)
def test_twenty_iterations_are_ten_a_kill_and_ten(tmp_path: Path, whole: Run, death: Signals) -> None:
    run = Run(tmp_path)
    assert outcome(lambda: run(death)) == -KILL
    assert run.checkpoints == {"epoch=3-step=20.ckpt", "last.ckpt"}
    assert outcome(run) == 0
    assert_undisturbed(run, whole)


@pytest.mark.slow
def test_what_is_added_to_lightnings_checkpoint_matters(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path)
    assert outcome(lambda: run(SignalsLast(KILL, 10, "on_train_batch_end"))) == -KILL
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)  # plain types
    del checkpoint["resuming"]
    torch.save(checkpoint, tmp_path / "checkpoints/epoch=3-step=20.ckpt")
    assert outcome(run) == 0
    assert different(whole.weights, run.weights)
    assert not any(step == 9 for _, step in scalars(tmp_path))


def test_epochs_are_counted_once(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", epochs=4)
    killed = Run(tmp_path / "killed", every=6, epochs=4)  # saved at the end of each epoch
    assert outcome(whole) == 0
    for iteration in (4, 7):  # at the second resume, Lightning alone repeats an epoch
        assert outcome(lambda i=iteration: killed(Signals(KILL, i, "on_train_batch_start"))) == -KILL
    assert outcome(killed) == 0
    assert_undisturbed(killed, whole)
