"""The benchmark of exploration: its arms' configs, and what it reads off its runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import exploration_report as report  # noqa: E402
from exploration_arms import BANDS, HARDEST, Arm, Run, arms  # noqa: E402

from sppo_lightning.callbacks import RolloutGeneration  # noqa: E402
from sppo_lightning.cli import command_line  # noqa: E402


def rows(*accuracies: float, tokens: int = 100) -> list[dict[str, Any]]:
    """Validations every so many tokens, with this accuracy on the hardest band and none elsewhere."""
    return [
        {"tokens": tokens * i, "seconds": 2.0 * i, "accuracy": {**dict.fromkeys(BANDS, 0.0), HARDEST: accuracy}}
        for i, accuracy in enumerate(accuracies)
    ]


def test_the_goal_is_reached_between_two_validations():
    assert report.reached(rows(0.0, 0.2, 0.6, 0.1), "tokens") == pytest.approx(175.0)
    assert report.reached(rows(0.0, 0.2, 0.6, 0.1), "seconds") == pytest.approx(3.5)
    assert report.reached(rows(0.0, 0.5), "tokens") == pytest.approx(100.0)
    assert report.reached(rows(0.7, 0.8), "tokens") == 0.0
    assert report.reached(rows(0.0, 0.49), "tokens") is None


def test_a_run_that_never_gets_there_counts_with_all_that_it_had():
    arm = report.figures_of([rows(0.0, 1.0), rows(0.0, 0.1, 0.2)])
    assert arm["tokens_to_goal"] == [50.0, None]
    assert report.least(arm, "tokens") == [50.0, 200]
    assert (arm["before"][HARDEST], arm["after"][HARDEST]) == (0.0, pytest.approx(0.6))


def test_the_report_compares_where_an_arm_got_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ends = {"uniform": [(0.1, 0.2)] * 3, "replay": [(0.4, 0.6), (0.4, 0.7), (0.1, 0.1)]}
    folders: dict[str, list[Path]] = {arm: [] for arm in ends}
    for arm, seeds in ends.items():
        for seed, accuracies in enumerate(seeds):
            folders[arm].append(tmp_path / arm / str(seed))
            folders[arm][-1].mkdir(parents=True)
            progress = rows(0.0, *accuracies, tokens=100_000)
            (folders[arm][-1] / "progress.json").write_text(json.dumps(progress))
    report.write(folders, tmp_path, tmp_path / "figures")
    lines = capsys.readouterr().out.splitlines()
    [uniform] = [line for line in lines if "uniform │" in line]
    [replay] = [line for line in lines if "replay │" in line]
    assert [cell.strip() for cell in uniform.split("│")[2:5]] == ["–  –  –", ">200,000", "1.00"]
    assert [cell.strip() for cell in replay.split("│")[2:5]] == ["150  133  –", "141,667", "0.71"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"exploration.png", "exploration_goal.png"}
    assert (tmp_path / "exploration.json").is_file()


def test_where_no_arm_got_there_nothing_is_compared(capsys: pytest.CaptureFixture[str]):
    arms = {name: report.figures_of([rows(0.0, 0.1)]) for name in ("uniform", "replay")}
    assert report.telling(arms) == []
    report.to_goal(arms)
    report.show(arms)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "replay │" in line]
    assert [cell.strip() for cell in line.split("│")[2:7]] == ["–"] * 5


@pytest.mark.parametrize("arm", arms(32), ids=lambda arm: arm.name)
def test_every_arm_is_a_config_that_the_command_takes(arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    config = Run(arm, seed=3, tokens=1000, every_tokens=500, enough=0.6, batch=32, easy=0.02).config(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    trainer: Any = command_line(["--config", "config.yaml"], run=False).trainer
    [clock] = [each for each in trainer.callbacks if type(each).__name__ == "TokenClock"]
    [generation] = [each for each in trainer.callbacks if isinstance(each, RolloutGeneration)]
    assert (clock.budget, clock.hardest, type(generation.engine).__name__) == (1000, HARDEST, "CountingEngine")
    assert generation.sampling.max_new_tokens == generation.validation.max_new_tokens
