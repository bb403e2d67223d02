import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sppo_lightning.errors import InputError
from sppo_lightning.verification import close_workers, verify_math
from sppo_lightning.verification.workers import WorkerPool


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    close_workers()


def statuses(pairs: list[tuple[str, str]], **settings: float) -> list[str]:
    """The status of each (answer, gold), the answer boxed as a model would."""
    responses = [rf"Hence \boxed{{{answer}}}." for answer, _ in pairs]
    return [verdict.status for verdict in verify_math(responses, [gold for _, gold in pairs], **settings)]


def test_numbers_need_no_worker():
    close_workers()
    assert statuses([("41", "42"), ("0.5", r"\frac12"), (r"\frac{1", "3"), ("4", r"\frac{1")]) == [
        "wrong",
        "correct",
        "no_answer",
        "unparsable_gold",
    ]
    assert multiprocessing.active_children() == []


def test_verdicts_carry_score_and_answer():
    verdicts = verify_math([r"\boxed{ 5 }", r"\boxed{6}", "none", r"\boxed{5}"], ["5", "5", "5", ""])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, None]
    assert [verdict.answer for verdict in verdicts] == ["5", "6", None, "5"]
    with pytest.raises(InputError, match="2 responses and 1 gold answers"):
        verify_math(["", ""], [""])


CORRECT = [
    (r"\sqrt{2}+3", r"3+\sqrt{2}"),
    (r"2(3r^2-2r-12)", r"6r^2-4r-24"),
    (r"2, 1", r"1,2"),
    (r"\frac{\pi}{10}", r"0.1\pi"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    ("y=2x+3", "2x+3=y"),
    (r"x \in (3,4]", "(3,4]"),
]
WRONG = [
    ("41=42", "42"),
    ("1+1=3", "3"),
    (r"3", r"3\sqrt{13}"),
    ("42 or 43", "42"),
    ("1.414214", r"\sqrt{2}"),
    ("(2,1)", "(1,2)"),
    (r"[3,4]", r"(3,4]"),
    ("q-p", "p-q"),
    ("x^2", "y^2"),
    (r"5\text{ million}", "5"),
    ("1 2", "12"),
    (r"5\text{ or more}", "5"),
]

GOOD = (r"\sqrt{8}", r"2\sqrt{2}", 0.0)
ENDLESS = ("5", r"\lfloor 3^{9^9}\rfloor", 0.0)  # one Python integer that holds the interpreter for minutes
HUGE = ("5", r"\lfloor 2^{2^{36}}\rfloor", 0.0)  # of eight gigabytes, at once


def test_what_only_algebra_decides():
    assert statuses(CORRECT, timeout_seconds=20) == ["correct"] * len(CORRECT)
    assert statuses(WRONG, timeout_seconds=20) == ["wrong"] * len(WRONG)


def test_no_python_of_a_response_is_run(tmp_path: Path):
    proof = tmp_path / "x"
    answers = [
        f"__import__('os').system('touch {proof}')",
        rf"\text{{__import__('os').system('touch {proof}')}}",
        f"open('{proof}', 'w')",
        f"(lambda: open('{proof}','w'))()",
        rf"\operatorname{{open}}('{proof}')",
    ]
    assert statuses([(answer, r"\pi") for answer in answers], timeout_seconds=20) == ["wrong"] * len(answers)
    # and not even where the refusals let it through
    checked = WorkerPool(1)
    try:
        assert "correct" not in checked.run([(answer, r"\pi", 0.0) for answer in answers], 20)
    finally:
        checked.close()
    assert not proof.exists()


def test_a_timeout_kills_one_item_and_loses_no_other():
    close_workers()
    pool = WorkerPool(2)
    try:
        assert pool.run([GOOD], 20) == ["correct"]
        start = time.perf_counter()
        found = pool.run([GOOD, ENDLESS, GOOD, ENDLESS, GOOD], 1.0)
        assert found == ["correct", "timeout", "correct", "timeout", "correct"]
        assert time.perf_counter() - start < 5
        assert pool.run([HUGE, GOOD], 20) == ["timeout", "correct"]  # stopped by the memory limit
    finally:
        pool.close()
    assert multiprocessing.active_children() == []


def test_a_killed_worker_crashes_its_item_alone():
    close_workers()
    pool = WorkerPool(1)
    try:
        assert pool.run([GOOD], 20) == ["correct"]
        (worker,) = multiprocessing.active_children()
        killer = threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        assert pool.run([ENDLESS, GOOD], 20) == ["crashed", "correct"]
    finally:
        pool.close()


def test_works_from_another_thread():
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.extend(statuses([(r"\sqrt{8}", r"2\sqrt{2}")], timeout_seconds=20))
    )
    thread.start()
    thread.join()
    assert found == ["correct"]


SCRIPT = r"""
import signal, sys, time
import multiprocessing
signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs the tests may have ignored
print("ran", flush=True)
from sppo_lightning.verification.math import _pool, verify_math
assert "torch" not in sys.modules and "sympy" not in sys.modules
status = verify_math([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"], timeout_seconds=20)[0].status
print(status, *(child.pid for child in multiprocessing.active_children()), flush=True)
if "hang" in sys.argv:
    _pool(2).run([("5", r"\lfloor 3^{9^9}\rfloor", 0.0)] * 2, 60)
"""


def run_script(path: Path, *args: str) -> subprocess.Popen[str]:
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.05)
    return not any(is_running(pid) for pid in pids)


def test_a_script_without_main_guard_runs_once_and_leaves_nothing(tmp_path: Path):
    script = run_script(tmp_path / "script.py")
    lines = script.communicate(timeout=60)[0].splitlines()
    assert lines[0] == "ran"
    assert len(lines) == 2
    status, *pids = lines[1].split()
    assert status == "correct"
    assert len(pids) == 2
    assert all_end([int(pid) for pid in pids])


def test_a_session_without_a_file_can_verify():
    """As in a notebook, whose main module cannot be imported."""
    run = subprocess.run(
        [sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, check=True, timeout=60
    )
    status, *pids = run.stdout.splitlines()[1].split()
    assert (status, len(pids), run.stderr) == ("correct", 2, "")
    assert all_end([int(pid) for pid in pids])


@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_busy_workers_die_with_the_trainer(tmp_path: Path, end: str):
    script = run_script(tmp_path / "script.py", "hang")
    assert script.stdout is not None
    assert script.stdout.readline() == "ran\n"
    status, *pids = script.stdout.readline().split()
    assert status == "correct"
    time.sleep(0.5)
    assert all(is_running(int(pid)) for pid in pids)
    if end == "kill":
        script.kill()
    else:
        os.killpg(script.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which the workers get too
    script.communicate(timeout=30)
    assert all_end([int(pid) for pid in pids])
