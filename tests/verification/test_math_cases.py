"""Answers as models write them, with the score that each deserves: equal in another spelling, or nearly right."""

import json
from pathlib import Path

import pytest

from sppo_lightning.verification import close_workers, verify_math

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    close_workers()


@pytest.mark.parametrize(
    "name",
    [
        "extraction",
        "numbers",
        "structures",
        "units_text",
        "hostile",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("expressions", "math500", "mixed", "probes")),
    ],
)
def test_every_case_has_its_score(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where a response that ran would leave a file
    cases = [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text().splitlines()]
    seconds = (
        1.0 if name in ("hostile", "mixed", "probes") else 20.0
    )  # what is hostile may time out, nothing else may
    verdicts = verify_math(
        [case["response"] for case in cases], [case["gold"] for case in cases], timeout_seconds=seconds
    )
    missed = [
        (case["gold"], verdict.answer, verdict.status)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.score != case["score"]
    ]
    assert missed == []
    assert list(tmp_path.iterdir()) == []
