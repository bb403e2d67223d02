"""Attacks on the sandbox: each really runs, and gets nowhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attacks import TESTS, answer, attack, children, nothing_is_left, succeeds  # noqa: F401 (a fixture)

from sppo_lightning.verification.sandbox import launch

pytestmark = pytest.mark.sandbox


@pytest.mark.parametrize(
    "expression",
    [
        "os.fork()",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "os.execv(sys.executable, [sys.executable, '-c', ''])",
        "os.system('true') and 1 / 0 or os.waitstatus_to_exitcode(os.system('true')) and 1 / 0",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX).bind('\\0abstract')",
        "socket.socketpair()",
        "os.kill(1, 9)",
        "os.kill(os.getppid(), 0)",
        "signal.raise_signal(signal.SIGSTOP)",
        "os.symlink('/', '/tmp/link')",
        "open('/tmp/a', 'w').close() or os.link('/tmp/a', '/tmp/b')",
        "os.mkfifo('/tmp/pipe')",
        "os.memfd_create('x')",
        "os.setpriority(os.PRIO_PROCESS, 1, 5)",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
        "os.unshare(0) if hasattr(os, 'unshare') else 1 / 0",
        "os.setuid(0)",
        "open('/x', 'w')",
        "open(sys.executable, 'ab')",
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/dev/zero')",
        "os.listdir('/home')",
        "os.listdir('/sys')",
    ],
)
def test_what_is_not_there_to_be_done(expression: str):
    assert succeeds(expression) is not True


@pytest.mark.parametrize(("number", "name"), [(56, "clone"), (435, "clone3"), (101, "ptrace"), (165, "mount")])
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_raw_system_calls(number: int, name: str):
    code = f"""
    import ctypes
    def f():
        libc = ctypes.CDLL(None, use_errno=True)
        return [libc.syscall({number}, 17, 0, 0, 0, 0), ctypes.get_errno()]
    """
    result, errno = answer(code)
    assert result == -1
    assert errno in (1, 38)


def test_the_machine_cannot_be_seen(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    os.environ["SPPO_SECRET"] = "x"
    code = """
    import os
    def f(path, process):
        descriptors = []
        for number in range(256):
            try:
                os.fstat(number)
                descriptors.append(number)
            except OSError:
                pass
        return {
            "file": os.path.exists(path), "home": os.path.exists(os.path.expanduser("~/.bashrc")),
            "secret": "SPPO_SECRET" in os.environ, "process": os.path.exists(f"/proc/{process}"),
            "user": os.getuid(), "descriptors": descriptors, "host": os.uname().nodename,
            "processes": os.getpid() < 20,
        }
    """
    try:
        found = answer(code, str(secret), os.getpid())
    finally:
        del os.environ["SPPO_SECRET"]
    assert found == {
        "file": False, "home": False, "secret": False, "process": False, "user": 65534, "descriptors": [0, 1, 2, 3],
        "host": "sandbox", "processes": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def f(x):\n    while True: pass", "timeout"),
        ("def f(x):\n    return 9 ** 9 ** 9", "timeout"),
        ("import time\ndef f(x):\n    time.sleep(99)", "timeout"),
        ("while True: pass", "timeout"),
        ("""
         import signal
         def f(x):
             for number in range(1, 65):
                 try: signal.signal(number, lambda *_: None)
                 except (OSError, ValueError): pass
             while True:
                 try:
                     while True: pass
                 except BaseException: pass
         """, "timeout"),
        ("""
         import os, time
         def f(x):
             for number in range(256):
                 try: os.close(number)
                 except OSError: pass
             time.sleep(99)
         """, "timeout"),
        ("def f(x):\n    y = []\n    while True: y.append(' ' * 10 ** 6)", "memory"),
        ("def f(x):\n    return ' ' * 10 ** 12", "memory"),
        ("import os\ndef f(x):\n    os._exit(0)", "error"),
        ("import os\nos._exit(0)", "error"),
        ("import sys\nsys.exit(0)\ndef f(x): return 1", "error"),
        ("import ctypes\ndef f(x):\n    ctypes.string_at(0)", "crashed"),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n    return f(x) + 1", None),
        ("""
         import threading, time
         def f(x):
             started = 0
             try:
                 while True:
                     threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
                     started += 1
             except (RuntimeError, MemoryError): return started
         """, "failed"),
        ("""
         def f(x):
             written = 0
             with open("/tmp/big", "wb") as file:
                 while True: written += file.write(b" " * 10 ** 6)
         """, None),
        ("def f(x):\n    return 'x' * 10 ** 7", "output"),
        ("def f(x):\n    while True: open('/tmp/' + str(x := x + 1).zfill(250), 'w').close()", "output"),
        # signals that the kernel sends for a pipe: to the first process, which no signal from inside stops, and to itself
        ("""
         import fcntl, os
         def f(x):
             for process in (1, os.getpid()):
                 read, write = os.pipe()
                 fcntl.fcntl(read, fcntl.F_SETOWN, process)
                 fcntl.fcntl(read, fcntl.F_SETSIG, 19)
                 fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
                 os.write(write, b"x")
         """, "timeout"),
        ("""
         import os
         def f(x):
             while True:
                 for number in (1, 2, 3):
                     try: os.write(number, b"x" * 65536)
                     except OSError: pass
         """, "output"),
    ],
)  # fmt: skip
def test_bombs(code: str, status: str | None):
    report = attack(code, seconds=1.5)
    assert status is None or report.status == status


def test_printed_floods_are_cut():
    flood = {"kind": "stdio", "cases": [{"stdin": "", "stdout": "x"}]}
    assert attack("while True: print('x' * 1000)", tests=flood).status == "output"


def test_nothing_persists_between_submissions():
    write = "def f():\n    open('/tmp/note', 'w').write('x')\n    return 1"
    read = "import os\ndef f():\n    return os.listdir('/tmp')"
    assert answer(write) == 1
    assert answer(read) == []


def test_threads_and_the_standard_library_work():
    code = """
    import threading, random, decimal, datetime, dataclasses, collections
    def f(n):
        found = []
        threads = [threading.Thread(target=found.append, args=(i,)) for i in range(n)]
        [t.start() for t in threads], [t.join() for t in threads]
        return sorted(found), str(decimal.Decimal(1) / 8), open("/tmp/x", "w").write("ab")
    """
    assert answer(code, 5) == ([0, 1, 2, 3, 4], "0.125", 2)


def test_deep_recursion_works():
    code = "import sys\nsys.setrecursionlimit(100_000)\ndef f(n):\n    return n and 1 + f(n - 1)"
    assert answer(code, 20_000) == 20_000


def test_nothing_survives_a_killed_trainer():
    script = "from sppo_lightning.verification.code import run_tests\n"
    script += f"run_tests('def f(x):\\n    while True: pass', {TESTS!r}, timeout_seconds=60)"
    trainer = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not any("sppo_sandbox" in line for line in children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children()
    trainer.kill()
    trainer.wait()


def test_the_report_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "REPORT_BYTES", 1000)
    assert attack("def f(x): return 'x' * 100_000").status == "output"


@pytest.mark.parametrize("kind", ["set", "dict"])
def test_keys_that_collide_do_not_stall_the_trainer(kind: str):
    # written into the pipe by hand, since Python inside would take as long to build it
    code = f"""
    import json, os
    def f(x):
        keys = [{{"int": hex(k * (2 ** 61 - 1))}} for k in range(1, 15_000)]
        content = keys if {kind!r} == "set" else [[k, None] for k in keys]
        os.write(3, json.dumps({{"value": {{{kind!r}: content}}}}).encode())
        os._exit(0)
    """
    start = time.monotonic()
    assert attack(code, seconds=3.0).status == "error"
    assert time.monotonic() - start < 3.0
