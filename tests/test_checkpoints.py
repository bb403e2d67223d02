"""Checkpoint files are whole or not there, whenever the process dies and whatever the disk says."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from kills import outcome

from sppo_lightning.checkpoint_search import flaw, looks_like_checkpoint, newest_whole
from sppo_lightning.checkpoints import AtomicCheckpointIO

LARGE = {"optimizer_states": [], "weights": torch.arange(500_000)}  # 4 MB
SMALL = {"optimizer_states": [], "weights": torch.arange(10)}


def save(checkpoint: dict[str, object], path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


def with_room_for(size: int, path: Path) -> None:
    """Saving where a file may not become larger; what is written beyond it gives an error, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    save(LARGE, path)


@pytest.mark.parametrize("there", [False, True], ids=["the first one", "one is there"])
def test_a_disk_without_room_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "a.ckpt"
    if there:
        save(SMALL, path)
    with pytest.raises(OSError, match="File too large"):
        # in this process it would hold for all tests
        raise_from(lambda: with_room_for(1_000_000, path))
    assert [each.name for each in tmp_path.iterdir()] == (["a.ckpt"] if there else [])
    if there:
        assert torch.equal(torch.load(path)["weights"], SMALL["weights"])


def raise_from(work: object) -> None:
    """Run in a fork, and raise the OSError that it ends with."""
    number = outcome(lambda: os._exit(_errno(work)))
    if number:
        raise OSError(number, os.strerror(number))


def _errno(work: object) -> int:
    try:
        work()  # type: ignore[operator]
    except OSError as error:
        return error.errno or 1
    return 0


def kill_while_writing(path: Path) -> None:
    """The process is killed when most of the file is there."""

    class Deadly:
        def __reduce__(self) -> tuple[type, tuple[()]]:
            os.kill(os.getpid(), signal.SIGKILL)
            return dict, ()

    save({**LARGE, "deadly": Deadly()}, path)


def kill_before_renaming(path: Path) -> None:
    """The process is killed when all is written and nothing is renamed."""
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
    save(LARGE, path)


@pytest.mark.parametrize("work", [kill_while_writing, kill_before_renaming])
def test_a_kill_leaves_what_was_there_and_the_next_save_tidies_up(tmp_path: Path, work: object) -> None:
    path = tmp_path / "a.ckpt"
    save(SMALL, path)
    assert outcome(lambda: work(path)) == -signal.SIGKILL  # type: ignore[operator]
    assert torch.equal(torch.load(path)["weights"], SMALL["weights"])
    assert len(list(tmp_path.iterdir())) == 2
    assert newest_whole(tmp_path) == (path, {})
    save(LARGE, tmp_path / "b.ckpt")
    assert {each.name for each in tmp_path.iterdir()} == {"a.ckpt", "b.ckpt"}


def test_torn_files_are_told_and_passed_over(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.ckpt" for name in "abcd"]
    for age, path in enumerate(paths):
        save(LARGE, path)
        os.utime(path, ns=(age * 10**9, age * 10**9))
    whole, content = paths[0], paths[0].read_bytes()
    middle = len(content) // 2
    paths[1].write_bytes(content[:middle])
    paths[2].write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    paths[3].write_bytes(b"")  # as after the machine has lost its power
    assert flaw(whole) is None
    assert flaw(paths[1]) == flaw(paths[3]) == "its end is missing"
    assert flaw(paths[2]) == "its part archive/data/0 is damaged"
    assert all(map(looks_like_checkpoint, paths))
    for age, path in enumerate(paths):
        os.utime(path, ns=(age * 10**9, age * 10**9))
    assert newest_whole(tmp_path) == (whole, {path: flaw(path) for path in paths[:0:-1]})


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    save({"weights": torch.zeros(2)}, tmp_path / "weights.ckpt")
    assert newest_whole(tmp_path) == (None, {})
    assert newest_whole(tmp_path / "nowhere") == (None, {})
