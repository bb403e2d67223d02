import json
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import CodeVerifier, RolloutGeneration
from sppo_lightning.errors import InputError
from sppo_lightning.verification.hidden_tests import split_tests

pytestmark = pytest.mark.sandbox
CASES = [{"args": [1, 2], "expected": 3}, {"args": [-1, 1], "expected": 0}]
ADD = {"kind": "function", "fn": "add", "cases": CASES}
RIGHT = "Here it is.\n```python\ndef add(a, b):\n    return a + b\n```"
HALF = "```python\ndef add(a, b):\n    return 3\n```"
LOOP = "```python\ndef add(a, b):\n    while True:\n        pass\n```"


def prompt(tests: Any = ADD, row: int = 0, gold: str = "") -> Prompt:
    return Prompt("Add two numbers.", gold, "code", row, metadata={} if tests is None else {"tests": tests})


@pytest.mark.parametrize(
    ("reward", "expected"), [("all", [1.0, 0.0, 0.0, 0.0]), ("fraction", [1.0, 0.5, 0.0, 0.0])]
)
def test_scores(reward: Any, expected: list[float]):
    verifier = CodeVerifier(reward=reward, timeout_seconds=1.0)
    assert verifier.score([prompt()] * 4, [RIGHT, HALF, LOOP, "add(a, b) = a + b"]) == expected
    assert verifier.counts == {"timeouts": 1}


def test_efficiency_is_the_reference_time_over_the_submissions():
    slow = "```python\ndef add(a, b):\n    for _ in range(3_000_000): pass\n    return a + b\n```"
    verifier = CodeVerifier(reward="efficiency")
    generous, strict = ({**ADD, "reference_seconds": seconds} for seconds in (100.0, 0.01))
    fast_score, slow_score, wrong = verifier.score(
        [prompt(generous), prompt(strict), prompt(generous)], [slow, slow, HALF]
    )
    assert fast_score == 1.0
    assert slow_score is not None
    assert 0 < slow_score < 0.5
    assert wrong == 0.0


def test_tests_may_stand_in_the_gold_answer_as_json():
    tests = {"kind": "stdio", "cases": [{"stdin": "2 3\n", "stdout": "5\n"}]}
    code = "```python\nprint(sum(map(int, input().split())))\n```"
    assert CodeVerifier().score([prompt(None, gold=json.dumps(tests))], [code]) == [1.0]


def test_the_same_submission_runs_once(monkeypatch: pytest.MonkeyPatch):
    verifier = CodeVerifier()
    runs = []
    real = verifier.sandbox.run
    monkeypatch.setattr(verifier.sandbox, "run", lambda *args: runs.append(args) or real(*args))
    assert verifier.score([prompt()] * 5, [RIGHT, RIGHT, HALF, RIGHT, "none"]) == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert len(runs) == 2


def test_a_sandbox_that_fails_gives_no_verdict(monkeypatch: pytest.MonkeyPatch):
    verifier = CodeVerifier()
    monkeypatch.setattr(verifier.sandbox, "_bubblewrap", ["bwrap", "--ro-bind", "/not/there", "/"])
    assert verifier.score([prompt()], [RIGHT]) == [None]
    assert verifier.counts["errors"] == 1
    assert "not/there" in verifier._first_traceback


@pytest.mark.parametrize(
    "tests", [None, "", "{", "[1]", {"kind": "function", "fn": "add", "cases": []}, {"kind": "?"}]
)
def test_a_prompt_without_tests_is_refused_by_its_row(tests: Any):
    with pytest.raises(InputError, match=r"Row 7 of 'code' cannot be tested: .+\."):
        CodeVerifier().score([prompt(tests, row=7)], [RIGHT])


def test_what_can_never_be_tested_is_said_when_the_data_is_loaded():
    one_case = {**ADD, "cases": CASES[:1]}
    assert CodeVerifier().unusable(prompt()) is None
    assert "column `tests`" in (CodeVerifier().unusable(prompt(None)) or "")
    assert "`reference_seconds`" in (CodeVerifier(reward="efficiency").unusable(prompt()) or "")
    assert CodeVerifier(hidden_share=0.5).unusable(prompt(one_case)) is None
    check = CodeVerifier(hidden_share=0.5, cases="hidden")
    assert check.unusable(prompt()) is None
    assert check.unusable(prompt(one_case)) == "it has no case to hide with `hidden_share`=0.5"


def test_a_submission_that_knows_the_visible_cases_fails_the_hidden_ones():
    sums = {**ADD, "cases": [{"args": [n, n + 1], "expected": 2 * n + 1} for n in range(6)]}
    visible, _ = split_tests(sums, 0.5, key="Add two numbers.")
    table = {tuple(case["args"]): case["expected"] for case in visible["cases"]}
    knows = f"```python\ndef add(a, b):\n    return {table}.get((a, b), 0)\n```"
    rewarded = CodeVerifier(hidden_share=0.5, reward="fraction")
    check = CodeVerifier(hidden_share=0.5, reward="fraction", cases="hidden")
    assert rewarded.score([prompt(sums)] * 2, [RIGHT, knows]) == [1.0, 1.0]
    assert check.score([prompt(sums)] * 2, [RIGHT, knows]) == [1.0, 0.0]


def test_the_sandbox_is_tried_out_before_the_run(monkeypatch: pytest.MonkeyPatch):
    def set_up(verifier: CodeVerifier) -> None:
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[RolloutGeneration(), verifier]
        )
        verifier.setup(trainer, LightningModule(), "fit")

    set_up(CodeVerifier())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="bubblewrap, which is not installed"):
        set_up(CodeVerifier())
    with pytest.warns(UserWarning, match=r"`CodeVerifier.unsafe_no_sandbox`=True"):
        set_up(CodeVerifier(unsafe_no_sandbox=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": "best"}, "`CodeVerifier.reward`=best is unknown; use all or fraction or efficiency."),
        ({"cases": "some"}, "`CodeVerifier.cases`=some is unknown; use visible or hidden."),
        ({"cases": "hidden"}, "`CodeVerifier.hidden_share`=0.0 leaves no hidden case; use such as 0.3."),
        ({"hidden_share": 1.0}, "`CodeVerifier.hidden_share`=1.0 leaves no visible case"),
        ({"timeout_seconds": 0}, "`CodeVerifier.timeout_seconds`=0"),
        ({"memory_mb": 1}, "`CodeVerifier.memory_mb`=1"),
        ({"workers": 0}, "`CodeVerifier.workers`=0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str):
    with pytest.raises(InputError) as raised:
        CodeVerifier(**settings)
    assert said in str(raised.value)
