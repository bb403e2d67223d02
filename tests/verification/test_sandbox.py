"""Attacks on the sandbox: each really runs, and gets nowhere."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.verification.code import TestReport, run_tests
from sppo_lightning.verification.sandbox import Sandbox, decode, encode, launch

pytestmark = pytest.mark.sandbox
TESTS = {"kind": "function", "fn": "f", "cases": [{"args": [1], "expected": "the right answer"}]}


def attack(code: str, seconds: float = 2.0, tests: dict[str, Any] = TESTS) -> TestReport:
    """What comes of a submission whose `f` does not know the answer."""
    start = time.monotonic()
    report = run_tests(textwrap.dedent(code), tests, timeout_seconds=seconds, memory_mb=256)
    assert time.monotonic() - start < seconds + 3.0
    assert report.passed == 0
    return report


def answer(code: str, *args: Any, seconds: float = 5.0) -> Any:
    """What `f` of a submission returns."""
    job = {
        "kind": "function",
        "fn": "f",
        "submission": textwrap.dedent(code),
        "cases": [{"args": encode(list(args))}],
    }
    (outcome,) = Sandbox(256).run(job, seconds)
    said = json.loads(outcome["said"])
    assert "value" in said, said
    return decode(said["value"])


def succeeds(expression: str, *args: Any) -> Any:
    """Whether an expression can be evaluated inside, or the name of what it raises."""
    return answer(
        f"""
        import ctypes, os, signal, socket, sys
        def f(*args):
            try:
                {expression}
                return True
            except BaseException as error:
                return type(error).__name__
        """,
        *args,
    )


def children() -> set[str]:
    """Processes of the machine that belong to a sandbox, and zombies of this process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        zombie = state == "Z" and (int(parent) == os.getpid() or name == "bwrap")
        if name == "bwrap" or "sppo_sandbox_runner" in command or zombie:
            found.add(f"{folder.name} {name} {state} {command}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    deadline = time.monotonic() + 2
    while (left := children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


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


@pytest.mark.parametrize(
    "code",
    [
        'import json\njson.dumps = lambda *_, **__: \'{"value": "the right answer"}\'\ndef f(x): return 0',
        "import builtins\nbuiltins.type = lambda x: str\nbuiltins.str = lambda x: 'y'\ndef f(x): return 0",
        'import os\ndef f(x):\n    os.write(3, b\'{"passed": 1, "total": 1}\')\n    os._exit(0)',
        'import os\ndef f(x):\n    os.write(1, b\'{"case": 0, "status": "passed"}\')\n    os._exit(0)',
        "class Any(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef f(x): return Any()",
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "class Any(dict):\n    def __eq__(self, other): return True\ndef f(x): return [Any()]",
        "class Any:\n    def __reduce__(self): return (print, ('the right answer',))\ndef f(x): return Any()",
        "import unittest, sys\nunittest.TestCase.assertEqual = lambda *_: None\nprint('all tests passed')\n"
        "def f(x): sys.exit(0)",
        "import atexit\natexit.register(print, 'the right answer')\ndef f(x): return None",
        "import time\ntime.process_time = time.time = lambda: 0\ndef f(x): return None",
        "import gc, sys\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found += [v for v in frame.f_locals.values() if isinstance(v, dict)]\n        frame = frame.f_back\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]\n"
        "    texts += [d for d in found if 'expected' in d]\n    return texts[0]['expected']",
        "import sys\ndef f(x): return ' '.join(sys.argv)",
        "import glob\ndef f(x):\n    for name in glob.glob('/tmp/**', recursive=True):\n"
        "        if 'right answer' in open(name).read(): return 'the right answer'",
    ],
)
def test_a_submission_does_not_decide_its_own_verdict(code: str):
    attack(code)


def test_asserts_are_decided_outside():
    code = "assert f(1) == 'the right answer'"
    for trick in (
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0",
        "import sys\ndef f(x): sys.exit(0)",
    ):
        attack(trick, tests={"kind": "asserts", "code": code})


def test_seconds_are_the_kernels():
    code = "import time\ntime.process_time = time.perf_counter = lambda: 0.0\n"
    code += "def f(x):\n    for _ in range(20_000_000): pass\n    return 1"
    assert attack(code, seconds=10.0).seconds > 0.1


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
