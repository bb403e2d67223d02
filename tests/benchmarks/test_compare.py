"""benchmarks/compare.py: the ratios of two reports."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"
OLD = {
    "machine": {"threads": 1},
    "cases": [{"speed": 10.0, "name": "a", "ok": True}, {"speed": 4.0}],
    "peak": 100,
    "zero": 0,
    "gone": 1,
}
NEW = {"machine": {"threads": 2}, "cases": [{"speed": 5.0}, {"speed": 16.0}], "peak": 103, "zero": 0, "fresh": 2}


def compare(folder: Path, *options: str) -> str:
    paths = [folder / "old.json", folder / "new.json"]
    for path, report in zip(paths, (OLD, NEW), strict=True):
        path.write_text(json.dumps(report))
    command = [sys.executable, str(SCRIPT), *map(str, paths), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_numbers_in_both_reports_by_how_far_they_are_from_each_other(tmp_path: Path):
    text = compare(tmp_path)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [["cases › 1 › speed", "4", "16", "4.00"], ["cases › 0 › speed", "10", "5", "0.50"]]
    assert "2 of 3 numbers differ by 5% or more." in text
    assert "In one of the reports alone: fresh, gone" in text
    assert "Not the same machine or versions:\n  old: {'threads': 1}\n  new: {'threads': 2}" in text


def test_what_is_shown_can_be_chosen(tmp_path: Path):
    assert "peak" in compare(tmp_path, "--least", "0.02")
    assert "0 of 3" in compare(tmp_path, "--only", "machine")
