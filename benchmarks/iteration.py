"""A whole iteration (sample, verify, update) of this project against TRL's `GRPOTrainer`, side by side.

Alike on both sides: the checkpoint, the prompts and their order, eight responses per prompt, their greatest
length, temperature 1, the reward, the number of updates, GRPO's loss, fp32, one thread. Ours is `fit` as anybody
runs it, with the quickstart's config and `configs/baselines/grpo.yaml`, TensorBoard's log included; TRL has its
best settings for a CPU (`iteration_trl.py` says which) and logs nothing. The third side is SPPO: the same prompts
and updates, with one response per prompt. Each run is a process of its own, and the sides take turns.

Ours leaves rows whose advantage is zero out of the forward, and takes the ratio's denominator from the sampler;
TRL does neither. "All responses teach" gives the first of these nothing to save, and with one update neither side
has old log-probabilities to compute.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from iteration_cases import GRPO, SIDES, SPPO, TRL, Case, all_cases, run, short_cases
from matplotlib.figure import Figure
from measuring import Spread, write_report
from rich.console import Console
from rich.table import Table

from sppo_lightning.figures.style import BLUE, GREY, ORANGE, legend_below, tidy

Results = dict[Case, dict[str, list[dict[str, Any]]]]  # by case and side: what each run wrote
_COLOURS = {TRL: GREY, GRPO: BLUE, SPPO: ORANGE}
_COLUMNS = (
    "",
    "responses per second",
    "× TRL",
    "by CPU time",
    "updates per second",
    "× TRL",
    "by CPU time",
    "sample / verify / update",
    "peak memory (training's part)",
    "tokens",
    "with advantage",
)


def seconds(runs: list[dict[str, Any]], clock: str = "seconds") -> list[float]:
    """Of every counted iteration, by the clock or in `cpu_seconds`, which other processes change less."""
    return [iteration[clock] for each in runs for iteration in each["iterations"]]


def responses_per_second(case: Case, side: str, runs: list[dict[str, Any]]) -> Spread:
    """Over all counted iterations."""
    return Spread.of([case.responses(side) / each for each in seconds(runs)])


def updates_per_second(case: Case, runs: list[dict[str, Any]]) -> Spread:
    """Over all counted iterations."""
    return Spread.of([case.updates / each for each in seconds(runs)])


def phases(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the time that each phase takes; the update is all that is neither of the others."""
    iterations = [iteration for each in runs for iteration in each["iterations"]]
    total = sum(iteration["seconds"] for iteration in iterations)
    shares = {name: sum(iteration[name] for iteration in iterations) / total for name in ("sample", "verify")}
    return {**shares, "update": 1.0 - sum(shares.values())}


def figures(case: Case, by_side: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What the report says of one case, by side."""
    made = {}
    for side, runs in by_side.items():
        made[side] = {
            "responses_per_second": vars(responses_per_second(case, side, runs)),
            "updates_per_second": vars(updates_per_second(case, runs)),
            "cpu_seconds": vars(Spread.of(seconds(runs, "cpu_seconds"))),
            "phases": phases(runs),
            "peak_mb": statistics.median(each["peak_mb"] for each in runs),
            "start_mb": statistics.median(each["start_mb"] for each in runs),
            "response_tokens": statistics.mean(each["response_tokens"] for each in runs),
            "with_advantage": statistics.mean(each["with_advantage"] for each in runs),
            "versions": runs[0]["versions"],
        }
    return made


def show(results: Results, console: Console) -> None:
    """A table per group of cases, with three rows per case."""
    for group in dict.fromkeys(case.group for case in results):
        table = Table(title=f"{group[0].upper()}{group[1:]}: median (least to greatest) of the iterations")
        for place, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if place else "left", no_wrap=not place)
        for case, by_side in results.items():
            if case.group == group:
                table.add_section()
                table.add_row(f"[bold]{case.name}[/bold], {case.prompts} prompts, {case.updates} updates")
                for cells in _rows(case, by_side):
                    table.add_row(*cells)
        console.print(table)


def _rows(case: Case, by_side: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    made = figures(case, by_side)
    for side, values in made.items():
        responses, updates, base = values["responses_per_second"], values["updates_per_second"], made[TRL]
        shares = values["phases"]
        by_cpu = base["cpu_seconds"]["median"] / values["cpu_seconds"]["median"]
        rows.append(
            [
                side,
                _spread(responses),
                f"{responses['median'] / base['responses_per_second']['median']:.2f}",
                f"{by_cpu * case.responses(side) / case.responses(TRL):.2f}",
                _spread(updates),
                f"{updates['median'] / base['updates_per_second']['median']:.2f}",
                f"{by_cpu:.2f}",
                f"{shares['sample']:.0%} / {shares['verify']:.1%} / {shares['update']:.0%}",
                f"{values['peak_mb']:.0f} MB ({values['peak_mb'] - values['start_mb']:.0f})",
                f"{values['response_tokens']:.1f}",
                f"{values['with_advantage']:.0%}",
            ]
        )
    return rows


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['least']:.3g} to {values['greatest']:.3g})"


def plot(results: Results, path: Path) -> None:
    """Response tokens per second and updates against TRL's, over the length of responses and the model's size."""
    figure = Figure(figsize=(10, 7))
    lengths = [case for case in results if case.group == "response length"]
    sizes = sorted((case for case in results if case.width and case.tokens == 64), key=lambda case: case.width or 0)
    left, right = figure.subplots(2, 2).T
    for cases, label, tokens, updates in zip(
        (lengths, sizes), ("tokens of each response", "width of the model"), left, right, strict=True
    ):
        places = [case.tokens if cases is lengths else case.width or 0 for case in cases]
        for side in SIDES:
            line = {"marker": "o", "color": _COLOURS[side], "label": side}
            speeds = [responses_per_second(c, side, results[c][side]).median * c.tokens for c in cases]
            tokens.plot(places, speeds, **line)
            ratios = [
                statistics.median(seconds(results[c][TRL])) / statistics.median(seconds(results[c][side]))
                for c in cases
            ]
            updates.plot(places, ratios, **line)
        tokens.set_yscale("log")
        tokens.yaxis.set_major_formatter("{x:,.0f}")
        tokens.yaxis.set_minor_formatter("")
        tokens.set_ylabel("response tokens per second")
        updates.set_ylim(bottom=0)
        updates.set_ylabel("updates per second, TRL = 1")
        for axes in (tokens, updates):
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.set_xlabel(label)
            tidy(axes)
    for axes in (left[1], right[1]):
        legend_below(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def measure(cases: list[Case], rounds: int, folder: Path, peer: str, report: Path) -> Results:
    """All cases, their sides in turns; one that takes long has fewer rounds. `report` is written after each."""
    results: Results = {}
    for case in cases:
        case.model(folder)
        by_side: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(rounds if case.width is None else max(1, rounds // 3)):
            for side in SIDES:
                by_side[side].append(run(case, side, folder, peer))
        results[case] = by_side
        medians = {side: statistics.median(seconds(runs)) for side, runs in by_side.items()}
        print(f"{case.group}, {case.name}: " + ", ".join(f"{s} {m:.2f} s" for s, m in medians.items()), flush=True)
        rows = [{"case": vars(case), "sides": figures(case, by_side)} for case, by_side in results.items()]
        write_report(report, {"cases": rows})
    return results


def check_peer(peer: str) -> None:
    """End with what to do about it where the interpreter has no TRL, before anything is measured."""
    script = str(Path(__file__).with_name("iteration_trl.py"))
    answer = subprocess.run([peer, "-W", "ignore", script, "--check"], capture_output=True, text=True)
    if answer.returncode:
        lines = answer.stderr.splitlines()
        sys.exit(lines[-1] if lines else f"{peer} does not run {script}.")


def main() -> None:
    """Measure, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; a third for long cases")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--cases", nargs="+", default=[""], help="only those with one of these in group or name")
    parser.add_argument("--short", action="store_true", help="one small case: a check, not a result")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/iteration"))
    parser.add_argument("--output", type=Path, default=None, help="JSON; the figure lies beside it")
    arguments = parser.parse_args()
    check_peer(arguments.peer_python)
    chosen = short_cases() if arguments.short else all_cases()
    chosen = [case for case in chosen if any(part in f"{case.group}, {case.name}" for part in arguments.cases)]
    if not chosen:
        sys.exit(f"No case has any of {arguments.cases} in its group or name; leave --cases out to see them all.")
    output = arguments.output or Path("runs/benchmarks", f"iteration{'_short' * arguments.short}.json")
    results = measure(chosen, arguments.rounds, arguments.folder, arguments.peer_python, output)
    show(results, Console(width=220))
    if {"response length", "model size"} <= {case.group for case in results}:
        plot(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
