"""How sandboxes are started: the copy of the interpreter, and those that are started ahead."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sppo_lightning.errors import InputError
from sppo_lightning.verification.code import check, plan, run_tests
from sppo_lightning.verification.sandbox import Sandbox, SandboxFailure, check_sandbox, encode, launch, stage
from sppo_lightning.verification.sandbox.spares import Spares

TESTS = {"kind": "function", "fn": "f", "cases": [{"args": [2], "expected": 4}]}
DOUBLE = plan(TESTS)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own, and a copy of the interpreter that is made in no time."""
    monkeypatch.setattr(stage.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(stage, "_fill", lambda root, sources: (root / "made").touch() or root.chmod(0o755))
    monkeypatch.setattr(stage, "_held", {})
    return tmp_path


def copy_of(folder: Path, days: float, name: str = "0123456789abcdef") -> Path:
    """Another copy of this user's, last taken up so long ago."""
    path = folder / f"sppo-sandbox-{os.geteuid()}-{name}"
    path.mkdir()
    (path / "made").touch()
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


def test_a_new_copy_takes_the_place_of_those_that_nobody_uses(temporary: Path):
    stale, recent, draft = (copy_of(temporary, *how) for how in ((2, "a"), (0.5, "b"), (2, "c-draft")))
    other = temporary / f"sppo-sandbox-{os.geteuid() + 1}-a"
    other.mkdir()
    os.utime(other, (0, 0))
    found = stage.stage()
    assert (found / "made").exists()
    assert not stale.exists()
    assert not draft.exists()
    assert sorted(temporary.iterdir()) == sorted([found, recent, other])


def test_a_copy_that_another_process_uses_stays(temporary: Path):
    used = copy_of(temporary, 0)
    code = "import sys; from pathlib import Path; from sppo_lightning.verification.sandbox import stage\n"
    code += "print(stage._hold(Path(sys.argv[1])), flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, used], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    os.utime(used, (0, 0))  # long ago
    current = stage.stage()
    assert used.exists()
    holder.communicate("\n")
    stage._remove_stale(current)
    assert not used.exists()


def test_a_copy_is_taken_up_again(temporary: Path):
    found = stage.stage()
    os.utime(found, (0, 0))
    stage._held.clear()
    (found / "made").unlink()
    assert stage.stage() == found
    assert not (found / "made").exists()  # it has not been made once more
    assert time.time() - found.stat().st_mtime < 60
    shutil.rmtree(found)
    assert (stage.stage() / "made").exists()


def test_a_copy_that_others_may_write_to_is_refused(temporary: Path):
    found = stage.stage()
    stage._held.clear()
    found.chmod(0o777)
    with pytest.raises(InputError, match="others may write to it; remove it"):
        stage.stage()
    shutil.rmtree(found)
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    found.symlink_to(elsewhere)
    with pytest.raises(InputError, match="belongs to somebody else"):
        stage.stage()


def test_spares_are_started_ahead_and_never_too_many():
    started: list[int] = []
    ended: list[int] = []
    spares = Spares(lambda: started.append(len(started)) or started[-1], ended.append, number=5, spare=2)
    deadline = time.monotonic() + 5
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert started == [0, 1]  # and no third
    assert [spares.take() for _ in range(4)] == [0, 1, 2, 3]
    assert spares._thread.is_alive()  # or what it started would die with it
    while len(started) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    spares.close()
    assert started == [0, 1, 2, 3, 4]
    assert ended == [4]
    assert spares.take() is None
    assert not spares._thread.is_alive()


def test_what_starting_raises_reaches_who_takes():
    spares = Spares(lambda: 1 / 0, lambda _: None, number=1, spare=1)
    with pytest.raises(ZeroDivisionError):
        spares.take()
    assert spares.take() is None
    spares.close()


@pytest.mark.sandbox
def test_no_sandbox_is_used_twice_and_none_is_left(monkeypatch: pytest.MonkeyPatch):
    sandbox, started = Sandbox(), []
    real = Sandbox._start
    monkeypatch.setattr(Sandbox, "_start", lambda *args: started.append(real(*args)) or started[-1])
    code = "import os\nassert os.listdir('/tmp') == []\nopen('/tmp/x', 'w')\ndef f(x): return x * 2"
    with sandbox.warm(runs=3, spare=2):
        assert [check(sandbox, code, DOUBLE, 5.0, 1).status for _ in range(4)] == ["passed"] * 4  # one more, cold
    assert len(started) == 4
    with sandbox.warm(runs=9, spare=2):
        pass
    assert {process.poll() is None for process in started} == {False}


@pytest.mark.sandbox
def test_starting_does_not_count_and_waiting_is_no_time_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "START_SECONDS", 5.0)
    sandbox = Sandbox()
    with sandbox.warm(runs=1, spare=1):
        time.sleep(1.0)  # longer than what the submission has
        report = check(sandbox, "import time\ndef f(x):\n    time.sleep(0.1)\n    return 4", DOUBLE, 0.4, 1)
    assert report.status == "passed"
    assert report.seconds < 0.1


@pytest.mark.sandbox
def test_a_spare_outlives_the_thread_that_asked_for_it():
    sandbox, reports = Sandbox(), []
    with sandbox.warm(runs=2, spare=2):
        for _ in range(2):
            thread = threading.Thread(
                target=lambda: reports.append(check(sandbox, "def f(x): return 4", DOUBLE, 5.0, 1))
            )
            thread.start()
            thread.join()
    assert [report.status for report in reports] == ["passed", "passed"]


@pytest.mark.sandbox
def test_a_killed_trainer_leaves_no_spare():
    code = "import time; from sppo_lightning.verification.sandbox import Sandbox\n"
    code += "with Sandbox().warm(9, 3):\n    time.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while len(runners()) < 6 and time.monotonic() < deadline:  # three, and what started them
            time.sleep(0.05)
        assert len(runners()) >= 6
    finally:
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 5
    while runners() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runners()


@pytest.mark.sandbox
def test_the_self_test_passes_here():
    check_sandbox(Sandbox())


@pytest.mark.sandbox
def test_a_machine_without_bubblewrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="`apt install bubblewrap`"):
        run_tests("", TESTS)


@pytest.mark.sandbox
def test_a_sandbox_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch):
    sandbox = Sandbox()
    monkeypatch.setattr(sandbox, "_bubblewrap", ["bwrap", "--ro-bind", "/not/there", "/"])
    with pytest.raises(InputError, match=r"does not start: bwrap: Can't find source path /not/there.*AppArmor"):
        check_sandbox(sandbox)
    with pytest.raises(SandboxFailure, match="Can't find source path"):
        sandbox.run({"kind": "function", "fn": "f", "submission": "", "cases": [{"args": encode([])}]}, 1.0)


@pytest.mark.sandbox
def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch):
    sandbox = Sandbox()
    command = [*sandbox._bubblewrap]
    place = command.index("--tmpfs")
    monkeypatch.setattr(
        sandbox, "_bubblewrap", [*command[: place - 2], "--bind", "/tmp", "/tmp", *command[place + 2 :]]
    )
    with pytest.raises(InputError, match="does not hold: a program in it can read a file"):
        check_sandbox(sandbox)


@pytest.mark.sandbox
def test_without_a_sandbox_limits_hold_all_the_same():
    sandbox = Sandbox(256, unsafe_no_sandbox=True)
    for code, expected in (
        ("def f(): return 1", '{"value": 1}'),
        ("import os\ndef f(): return os.fork()", '{"error": "PermissionError"'),
        ("def f(): return ' ' * 10 ** 12", '{"error": "MemoryError"}'),
    ):
        job = {"kind": "function", "fn": "f", "submission": code, "cases": [{"args": encode([])}]}
        (outcome,) = sandbox.run(job, 5.0)
        assert outcome["said"].startswith(expected)


def runners() -> list[str]:
    """Processes of the machine that are, or start, a sandbox's interpreter."""
    listed = subprocess.run(["ps", "-wweo", "stat,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "sppo_sandbox_runner" in line and not line.startswith("Z")]
