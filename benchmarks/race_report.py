"""What the race came to: a table, JSON and the two figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sppo_lightning.evaluation import by_dataset
from sppo_lightning.figures import Curve, race_figure

Key = tuple[str, str]  # method and protocol
Runs = Mapping[Key, Sequence[tuple[Path, float]]]  # folders of the runs, with their learning rates
PROTOCOLS = {
    "prompts": "same prompts per iteration (the paper's)",
    "samples": "same responses per iteration",
}


def load(folder: Path) -> dict[str, Any]:
    """A run's summary."""
    return json.loads((folder / "summary.json").read_text())


def curve(summary: Mapping[str, Any]) -> Curve:
    """Sampled accuracy at each validation, by seconds of training and by responses sampled."""
    responses = np.concatenate([[0], np.cumsum([row["responses"] for row in summary["curve"]])])
    validations = summary["validations"]
    return Curve(
        seconds=[row["seconds"] for row in validations],
        samples=[float(responses[row["iteration"]]) for row in validations],
        accuracy=[accuracy(row) for row in validations],
    )


def accuracy(validation: Mapping[str, Any], dataset: str = "all") -> float:
    """Share of the sampled responses solved."""
    return by_dataset(validation["metrics"], r"avg@\d+")[dataset]


def scan_score(folder: Path) -> float:
    """What a learning rate is chosen by: the mean of the last three validations' accuracies."""
    return float(np.mean(curve(load(folder)).accuracy[-3:]))


def mean_curve(curves: Sequence[Curve], x: str) -> tuple[np.ndarray, np.ndarray]:
    """200 places on the axis `x` that all seeds reach, and the mean accuracy there."""
    grid = np.linspace(0.0, min(getattr(c, x)[-1] for c in curves), 200)
    return grid, np.mean([np.interp(grid, getattr(c, x), c.accuracy) for c in curves], axis=0)


def reached(curves: Sequence[Curve], goal: float, x: str) -> float | None:
    """Where on the axis `x` the mean over seeds first is at `goal`."""
    grid, rates = mean_curve(curves, x)
    above = np.flatnonzero(rates >= goal)
    return float(grid[above[0]]) if len(above) else None


def row(runs: Sequence[tuple[Path, float]]) -> dict[str, Any]:
    """One method's figures, with the spread over seeds."""
    summaries = [load(folder) for folder, _ in runs]
    curves = [curve(summary) for summary in summaries]
    first, last = ([c.accuracy[i] for c in curves] for i in (0, -1))
    by_length = {name: [accuracy(s["validations"][-1], name) for s in summaries] for name in ("short", "long")}
    early = [s["curve"][:10] for s in summaries]  # the methods still have similar policies
    seconds = [s["seconds"] for s in summaries]
    return {
        "lr": runs[0][1],
        "curves": [vars(c) for c in curves],
        "before": float(np.mean(first)),
        "after": float(np.mean(last)),
        "after_std": float(np.std(last, ddof=1)) if len(last) > 1 else 0.0,
        "after_by_seed": last,
        "short": float(np.mean(by_length["short"])),
        "long": float(np.mean(by_length["long"])),
        "mean_over_time": float(np.mean([np.trapezoid(c.accuracy, c.seconds) / c.seconds[-1] for c in curves])),
        "iterations": float(np.mean([s["iterations"] for s in summaries])),
        "seconds_per_iteration": float(np.mean([s["curve"][-1]["seconds"] / s["iterations"] for s in summaries])),
        "responses": float(np.mean([c.samples[-1] for c in curves])),
        "rollout_share": float(np.mean([s["rollout"] / (s["rollout"] + s["update"]) for s in seconds])),
        "advantage_variance": float(np.mean([r["advantage_std"] ** 2 for rows in early for r in rows])),
        "grad_norm": float(np.mean([r["policy_grad_norm"] for rows in early for r in rows])),
        "grad_norm_variance": float(np.mean([np.var([r["policy_grad_norm"] for r in rows]) for rows in early])),
        "peak_memory_mb": float(np.max([s["peak_memory_mb"] for s in summaries])),
        "critic_pearson": [s["critic_pearson"] for s in summaries],
    }


def write(raced: Runs, scanned: Runs, folder: Path, figures: Path) -> None:
    """Tables on the terminal, `race.json` in `folder`, and a figure per axis in `figures`."""
    rows = {key: row(runs) for key, runs in raced.items()}
    result: dict[str, Any] = {"scan": {}, "race": {}}
    for (method, protocol), runs in scanned.items():
        result["scan"].setdefault(protocol, {})[method] = {f"{lr:g}": scan_score(path) for path, lr in runs}
    figures.mkdir(parents=True, exist_ok=True)
    for protocol, title in PROTOCOLS.items():
        # a method with one response per prompt is the same in both
        methods = {m: r for (m, p), r in rows.items() if p == protocol or (m, "samples") not in rows}
        grpo = [Curve(**c) for c in methods["GRPO"]["curves"]] if "GRPO" in methods else []
        goal = float(mean_curve(grpo, "seconds")[1].max()) if grpo else float("nan")
        for values in methods.values():
            for x in ("seconds", "samples"):
                values[f"{x}_to_grpo"] = reached([Curve(**c) for c in values["curves"]], goal, x)
        result["race"][protocol] = {"goal": goal, "methods": {m: dict(r) for m, r in methods.items()}}
        show(methods, title, goal)
        for x in ("seconds", "samples"):
            drawn = {m: [Curve(**c) for c in r["curves"]] for m, r in methods.items()}
            figure = race_figure(drawn, x, title=f"Accuracy on held-out chains, {title}")  # type: ignore[arg-type]
            figure.savefig(figures / f"race_{protocol}_{x}.png", dpi=110)
    (folder / "race.json").write_text(json.dumps(result, indent=1))
    print(f"Written: {folder / 'race.json'} and four figures in {figures}")


def show(methods: Mapping[str, Mapping[str, Any]], title: str, goal: float) -> None:
    """One protocol's table."""
    table = Table(title=f"{title}; GRPO's best mean accuracy {goal:.3f}")
    columns = "method|lr|before|after|2–4|8–10|mean over time|s to GRPO|ratio|samples to GRPO|s/iteration|rollout"
    for column in f"{columns}|var A|norm g|var norm g|MB".split("|"):
        table.add_column(column, justify="right")
    grpo = methods.get("GRPO", {}).get("seconds_to_grpo")
    for name, r in sorted(methods.items(), key=lambda item: -item[1]["after"]):
        seconds, samples = r["seconds_to_grpo"], r["samples_to_grpo"]
        table.add_row(
            name,
            f"{r['lr']:g}",
            f"{r['before']:.3f}",
            f"{r['after']:.3f} ± {r['after_std']:.3f}",
            f"{r['short']:.2f}",
            f"{r['long']:.2f}",
            f"{r['mean_over_time']:.3f}",
            "–" if seconds is None else f"{seconds:.0f}",
            "–" if seconds is None or not grpo else f"{grpo / seconds:.1f}",
            "–" if samples is None else f"{samples:,.0f}",
            f"{r['seconds_per_iteration']:.2f}",
            f"{r['rollout_share']:.0%}",
            f"{r['advantage_variance']:.3f}",
            f"{r['grad_norm']:.2f}",
            f"{r['grad_norm_variance']:.3f}",
            f"{r['peak_memory_mb']:.0f}",
        )
    Console(width=190).print(table)
