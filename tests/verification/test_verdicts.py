"""Submissions that try to decide their own verdict."""

import pytest
from attacks import attack, nothing_is_left  # noqa: F401 (a fixture)

pytestmark = pytest.mark.sandbox


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
