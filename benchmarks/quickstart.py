"""The main job on the embedded task: warm start, then SPPO beside its control, and a summary of all three.

One run goes to runs/quickstart; `--seeds 5` makes five, in runs/quickstart_seeds, and prints a table over them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sppo_lightning.figures import learning_curve

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
SETS = ("all", "short", "medium", "long")


def start(config: str, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `fit` with a quickstart config, its relative paths below `folder`."""
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", str(CONFIGS / config), *options]
    print(f"\n$ python {' '.join(command[1:])}   (in {folder})", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run; end with its status where it failed."""
    if process.wait():
        sys.exit(process.returncode)


def run(folder: Path, seed: int, seconds: int, flawless: bool) -> dict[str, Any]:
    """Warm start, SPPO and control with one seed; writes summary.json and learning_curve.png."""
    solutions = ["--config", "{data: {init_args: {train: {init_args: {slips: {3: 0.0}}}}}}"] if flawless else []
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "runs" / "quickstart" if folder != Path() else Path("runs/quickstart")
    shutil.rmtree(results, ignore_errors=True)
    begin = time.perf_counter()
    finish(start("sft.yaml", folder, f"--seed_everything={seed}", *solutions))
    limit = f"--trainer.max_time=00:00:{seconds // 60:02d}:{seconds % 60:02d}"
    # side by side, one thread each: both have the same time on the same machine
    control = start("control.yaml", folder, f"--seed_everything={seed}", limit, *solutions)
    finish(start("sppo.yaml", folder, f"--seed_everything={seed}", limit))
    finish(control)
    return combine(results, time.perf_counter() - begin)


def combine(results: Path, total: float) -> dict[str, Any]:
    """The summary of SPPO's run with the control's result and the warm start's seconds in it."""
    runs = {
        name: json.loads((results / name / "summary.json").read_text())
        for name in ("warm_start", "sppo", "control")
    }
    summary = runs["sppo"]
    summary["control"] = runs["control"]["after"]
    summary["seconds"]["warm_start"] = runs["warm_start"]["seconds"]["total"]
    summary["seconds"]["job"] = total
    summary["peak_memory_mb"] = max(run["peak_memory_mb"] for run in runs.values())
    (results / "summary.json").write_text(json.dumps(summary, indent=2))
    figure = learning_curve(
        summary["curve"], summary["validations"], control=runs["control"]["validations"], title="SPPO, quickstart"
    )
    figure.savefig(results / "learning_curve.png", dpi=120)
    return summary


def show(summary: dict[str, Any], results: Path) -> None:
    """Print accuracy before, after and of the control, by difficulty, and where the time went."""
    table = Table(title="Accuracy on held-out chains")
    for column in ("operations", "before", "after SPPO", "after control", "greedy before", "greedy after"):
        table.add_column(column, justify="right")
    names = {"all": "2-10", "short": "2-4", "medium": "5-7", "long": "8-10"}
    for key in SETS:
        before, after, control = (summary[part] for part in ("before", "after", "control"))
        cells = [before["sampled"], after["sampled"], control["sampled"], before["greedy"], after["greedy"]]
        table.add_row(names[key], *(f"{cell[key]:.3f}" for cell in cells))
    console = Console(width=100)
    console.print(table)
    seconds = {name: f"{value:.0f} s" for name, value in summary["seconds"].items()}
    console.print("Time: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    console.print(
        f"Critic: Pearson of V against the pass rate at 16 samples {summary['critic_pearson']:.2f}. "
        f"Peak memory of one process {summary['peak_memory_mb']:.0f} MB."
    )
    console.print(f"Written: {results}/summary.json and {results}/learning_curve.png")


def show_seeds(summaries: list[dict[str, Any]], path: Path) -> None:
    """Print one line per seed and their mean, and write them as JSON."""
    table = Table(title="Sampled accuracy, by seed")
    for column in ("seed", *(f"{s} before → after (control)" for s in SETS), "Pearson", "job"):
        table.add_column(column, justify="right")
    rows = []
    for seed, summary in enumerate(summaries, 1):
        parts = [[summary[p]["sampled"][s] for p in ("before", "after", "control")] for s in SETS]
        rows.append([*parts, summary["critic_pearson"], summary["seconds"]["job"]])
        cells = [f"{b:.2f} → {a:.2f} ({c:.2f})" for b, a, c in parts]
        table.add_row(str(seed), *cells, f"{rows[-1][-2]:.2f}", f"{rows[-1][-1]:.0f} s")
    means = [[sum(row[i][j] for row in rows) / len(rows) for j in range(3)] for i in range(len(SETS))]
    mean = [sum(row[i] for row in rows) / len(rows) for i in (-2, -1)]
    cells = [f"{b:.2f} → {a:.2f} ({c:.2f})" for b, a, c in means]
    table.add_row("mean", *cells, f"{mean[0]:.2f}", f"{mean[1]:.0f} s")
    Console(width=140).print(table)
    keys = ("before", "after", "control", "critic_pearson", "seconds", "peak_memory_mb")
    path.write_text(json.dumps([{key: summary[key] for key in keys} for summary in summaries], indent=2))


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, with seeds 1, 2, …")
    parser.add_argument("--seconds", type=int, default=120, help="time of SPPO, and of its control")
    parser.add_argument("--flawless", action="store_true", help="worked solutions without the pupil's mistakes")
    parser.add_argument("--short", action="store_true", help="20 seconds of SPPO: a check, not a result")
    arguments = parser.parse_args()
    seconds = 20 if arguments.short else arguments.seconds
    if arguments.seeds == 1:
        show(run(Path(), 1, seconds, arguments.flawless), Path("runs/quickstart"))
        return
    folder = Path("runs/quickstart_seeds_flawless" if arguments.flawless else "runs/quickstart_seeds")
    seeds = range(1, arguments.seeds + 1)
    summaries = [run(folder / str(seed), seed, seconds, arguments.flawless) for seed in seeds]
    show_seeds(summaries, folder / "summary.json")


if __name__ == "__main__":
    main()
