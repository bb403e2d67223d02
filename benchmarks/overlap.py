"""Iterations per second of SPPO with and without sampling ahead, and what the age of the samples costs.

The quickstart's task on two cores: `prefetch=1` has one to learn and one to sample. `prefetch=0` runs with one
thread and with two, whichever is faster. Runs take turns; each is a process of its own with the same updates, so
the pass rates at their ends compare learning from the same number of samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from measuring import Spread, save_figure, write_report
from race_runs import QUICKSTART, quiet_environment, warm_model, warm_start
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sppo_lightning.figures.style import BLUE, ORANGE

_WARM_UP = 5  # iterations that are not counted: the process that samples starts, the caches fill


@dataclass(frozen=True)
class Setting:
    """What is compared."""

    name: str
    prefetch: int
    threads: int


SETTINGS = (
    Setting("prefetch=0, one thread", 0, 1),
    Setting("prefetch=0, two threads", 0, 2),
    Setting("prefetch=1, one thread each", 1, 1),
)


def config(setting: Setting, seed: int, iterations: int, folder: Path) -> dict[str, Any]:
    """The quickstart's configuration, cut to so many iterations, with a validation at its end."""
    made = yaml.safe_load((QUICKSTART / "sppo.yaml").read_text())
    made |= {"seed_everything": seed, "threads": setting.threads}
    model = str(warm_model(folder, seed))
    settings = made["model"]["init_args"]
    settings["policy"]["init_args"]["pretrained"] = settings["critic"]["init_args"]["tokenizer"] = model
    trainer = made["trainer"]
    trainer.pop("max_time")
    trainer |= {
        "max_steps": 2 * iterations,
        "default_root_dir": ".",
        "enable_checkpointing": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": ".", "name": "log", "version": ""},
        },
    }
    kept = ("RolloutGeneration", "ExactMatch", "RunSummary")
    trainer["callbacks"] = [each for each in trainer["callbacks"] if each["class_path"].split(".")[-1] in kept]
    for each in trainer["callbacks"]:
        if each["class_path"].endswith("RolloutGeneration"):
            each["init_args"]["prefetch"] = setting.prefetch
        if each["class_path"].endswith("RunSummary"):
            each["init_args"]["path"] = "summary"
    return made


def run(setting: Setting, seed: int, iterations: int, folder: Path) -> dict[str, Any]:
    """One run: seconds of each iteration by phase, and the pass rate at the end."""
    target = folder / f"{setting.prefetch}_{setting.threads}_{seed}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "config.yaml").write_text(yaml.safe_dump(config(setting, seed, iterations, folder.resolve())))
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", "config.yaml"]
    environment = quiet_environment(setting.threads)
    with (target / "output.txt").open("w") as output:
        subprocess.run(command, cwd=target, env=environment, check=True, stdout=output, stderr=output)
    log = EventAccumulator(str(target / "log"), size_guidance={"scalars": 0}).Reload()
    phases = {name: [e.value for e in log.Scalars(f"time/{name}")] for name in ("rollout", "verify", "update")}
    moments = [event.wall_time for event in log.Scalars("time/update")]
    summary = json.loads((target / "summary" / "summary.json").read_text())
    return {
        "iterations_per_second": (len(moments) - 1 - _WARM_UP) / (moments[-1] - moments[_WARM_UP]),
        "phases": {name: statistics.median(values[_WARM_UP:]) for name, values in phases.items()},
        "after": summary["after"]["sampled"]["all"],
    }


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """A row per setting."""
    table = Table(title="Sampling ahead: 256 responses and two updates per iteration, two cores")
    for column in ("", "iterations per second", "× ", "waiting to sample", "update", "pass rate after"):
        table.add_column(column, justify="right")
    base = max(_speed(results[setting.name]).median for setting in SETTINGS if not setting.prefetch)
    for name, runs in results.items():
        phases = [statistics.median(run["phases"][phase] for run in runs) for phase in ("rollout", "update")]
        speed, after = _speed(runs), Spread.of([run["after"] for run in runs])
        spread = f"{speed.median:.2f} ({speed.least:.2f} to {speed.greatest:.2f})"
        rates = f"{after.median:.3f} ({after.least:.3f} to {after.greatest:.3f})"
        table.add_row(
            name, spread, f"{speed.median / base:.2f}", *(f"{seconds:.2f} s" for seconds in phases), rates
        )
    Console(width=130).print(table)


def _speed(runs: list[dict[str, Any]]) -> Spread:
    return Spread.of([run["iterations_per_second"] for run in runs])


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds per iteration as bars, and pass rates after the same samples beside them."""
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    left.barh(names, [_speed(results[name]).median for name in names], color=BLUE)
    left.set_xlabel("iterations per second")
    for place, name in enumerate(names):
        right.scatter([run["after"] for run in results[name]], [place] * len(results[name]), color=ORANGE)
    right.set_xlabel("pass rate after the same number of samples, one point per seed")
    save_figure(figure, path)


def main() -> None:
    """Run all settings in turns, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/overlap"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/overlap.json"))
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in SETTINGS}
    for seed in arguments.seeds:
        warm_start(arguments.folder, seed)
        for setting in SETTINGS:
            results[setting.name].append(run(setting, seed, arguments.iterations, arguments.folder))
            speed = results[setting.name][-1]["iterations_per_second"]
            print(f"seed {seed}, {setting.name}: {speed:.2f} iterations per second", flush=True)
    show(results)
    write_report(arguments.output, {"iterations": arguments.iterations, "runs": results})
    plot(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
