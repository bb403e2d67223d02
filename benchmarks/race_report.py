"""What the race came to: tables, JSON and figures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from race_runs import Rates
from rich.console import Console
from rich.table import Table

from sppo_lightning.evaluation import by_dataset
from sppo_lightning.figures import Curve, race_figure

Key = tuple[str, str]  # method and protocol
Runs = Mapping[Key, Sequence[tuple[Path, Rates]]]  # folders of the runs
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


def written(rates: Rates) -> str:
    """The policy's learning rate, and the critic's behind it."""
    return "/".join(f"{rate:g}" for rate in rates if rate is not None)


def mean_curve(curves: Sequence[Curve], x: str) -> tuple[np.ndarray, np.ndarray]:
    """200 places on the axis `x` that all seeds reach, and the mean accuracy there."""
    grid = np.linspace(0.0, min(getattr(c, x)[-1] for c in curves), 200)
    return grid, np.mean([np.interp(grid, getattr(c, x), c.accuracy) for c in curves], axis=0)


def reached(curves: Sequence[Curve], goal: float, x: str) -> float | None:
    """Where on the axis `x` the mean over seeds first is at `goal`."""
    grid, rates = mean_curve(curves, x)
    above = np.flatnonzero(rates >= goal)
    return float(grid[above[0]]) if len(above) else None


def row(runs: Sequence[tuple[Path, Rates]]) -> dict[str, Any]:
    """One method's figures, with the spread over seeds."""
    summaries = [load(folder) for folder, _ in runs]
    curves = [curve(summary) for summary in summaries]
    first, last = ([c.accuracy[i] for c in curves] for i in (0, -1))
    by_length = {name: [accuracy(s["validations"][-1], name) for s in summaries] for name in ("short", "long")}
    return {
        "rates": runs[0][1],
        "curves": [vars(c) for c in curves],
        "before": float(np.mean(first)),
        "after": float(np.mean(last)),
        "after_std": float(np.std(last, ddof=1)) if len(last) > 1 else 0.0,
        "after_by_seed": last,
        "short": float(np.mean(by_length["short"])),
        "long": float(np.mean(by_length["long"])),
        "mean_over_time": float(np.mean([np.trapezoid(c.accuracy, c.seconds) / c.seconds[-1] for c in curves])),
        "iterations": float(np.mean([s["iterations"] for s in summaries])),
        "responses": float(np.mean([c.samples[-1] for c in curves])),
        **memory([folder for folder, _ in runs]),
        "critic_pearson": [s["critic_pearson"] for s in summaries],
        **time_shares([folder for folder, _ in runs], summaries),
        **signal_variance(summaries),
    }


def memory(folders: Sequence[Path]) -> dict[str, float]:
    """The largest peak of the process in training, and how far it lies above what was there before, in MB."""
    found = [json.loads((folder / "memory.json").read_text()) for folder in folders]
    return {
        "peak_memory_mb": float(np.max([each["peak"] for each in found])),
        "added_memory_mb": float(np.max([each["peak"] - each["before"] for each in found])),
    }


def time_shares(folders: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of an iteration, and the shares of its phases; the critic's is part of the others."""
    shares: dict[str, list[float]] = {"seconds_per_iteration": [], "rollout": [], "update": [], "critic": []}
    for folder, summary in zip(folders, summaries, strict=True):
        seconds = summary["seconds"]
        total = seconds["rollout"] + seconds["verify"] + seconds["update"]
        critic = sum(json.loads((folder / "critic_seconds.json").read_text()).values())
        shares["seconds_per_iteration"].append(total / summary["iterations"])
        for name, value in {"critic": critic, "rollout": seconds["rollout"], "update": seconds["update"]}.items():
            shares[name].append(value / total)
    return {name: float(np.mean(values)) for name, values in shares.items()}


def signal_variance(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of A and of the gradient's norm, over the last half of a run: by then a critic has learned what it is for."""
    halves = [s["curve"][len(s["curve"]) // 2 :] for s in summaries]
    rows = [r for half in halves for r in half]
    early = [r for s in summaries for r in s["curve"][:5]]
    norms = [
        np.array([r["policy_grad_norm"] for r in half if r["policy_grad_norm"] is not None]) for half in halves
    ]

    def square(rows: Sequence[Mapping[str, float]]) -> float:
        return float(np.mean([r["advantage_std"] ** 2 + r["advantage_mean"] ** 2 for r in rows]))

    return {
        "reward": float(np.mean([r["reward"] for r in rows])),
        "advantage_variance": float(np.mean([r["advantage_std"] ** 2 for r in rows])),
        "advantage_square": square(rows),
        "early_advantage_square": square(early),
        "grad_norm": float(np.mean([n.mean() for n in norms])),
        "grad_norm_variance": float(np.mean([n.var() for n in norms])),
        "grad_norm_variation": float(np.mean([n.std() / n.mean() for n in norms])),
    }


def write(
    raced: Runs,
    scanned: Runs,
    family: Runs,
    prompts: Mapping[str, Any],
    variants: Collection[str],
    folder: Path,
    figures: Path,
) -> None:
    """Tables on the terminal, `race.json` in `folder`, and a figure per axis in `figures`.

    `prompts` says how hard the prompts are (`pass_rates.report`); `variants` are methods that stand in the tables
    and not in the figures.
    """
    rows = {key: row(runs) for key, runs in raced.items()}
    result: dict[str, Any] = {"prompts": prompts, "scan": {}, "race": {}}
    for (method, protocol), runs in scanned.items():
        scores: dict[str, list[float]] = {}  # of one or two warm starts
        for path, rates in runs:
            scores.setdefault(written(rates), []).append(scan_score(path))
        result["scan"].setdefault(protocol, {})[method] = scores
    for protocol, title in PROTOCOLS.items():
        # a method with one response per prompt is the same in both
        methods = {m: r for (m, p), r in rows.items() if p == protocol or (m, "samples") not in rows}
        grpo = [Curve(**c) for c in methods["GRPO"]["curves"]] if "GRPO" in methods else []
        goal = float(mean_curve(grpo, "seconds")[1].max()) if grpo else float("nan")
        for values in methods.values():
            for x in ("seconds", "samples"):
                values[f"{x}_to_grpo"] = reached([Curve(**c) for c in values["curves"]], goal, x)
        result["race"][protocol] = {"goal": goal, "methods": {m: dict(r) for m, r in methods.items()}}
        show_learning(methods, f"{title}; GRPO's best mean accuracy {goal:.3f}")
        show_cost(methods, title)
        for x in ("seconds", "samples"):
            drawn = {m: [Curve(**c) for c in r["curves"]] for m, r in methods.items() if m not in variants}
            figure = race_figure(drawn, x, title=title[0].upper() + title[1:])  # type: ignore[arg-type]
            figure.savefig(figures / f"race_{protocol}_{x}.png", dpi=110)
    result["family"] = {method: row(runs) for (method, _), runs in family.items()}
    show_family(result["family"])
    of_prompts = {key: round(value, 3) for key, value in prompts.items() if key != "rates"}
    print(f"Pass rates of the prompts before training: {of_prompts}")
    (folder / "race.json").write_text(json.dumps(result, indent=1))
    print(f"Written: {folder / 'race.json'} and five figures in {figures}")


def show_learning(methods: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """One protocol's accuracies, the best method first."""
    table = Table(title=title)
    columns = "method|rates|before|after|2–4|8–10|mean over time|s to GRPO|ratio|samples to GRPO|ratio|pearson"
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    grpo = methods.get("GRPO", {})
    for name, r in _best_first(methods):
        cells = []
        for x in ("seconds", "samples"):
            own, best = r[f"{x}_to_grpo"], grpo.get(f"{x}_to_grpo")
            cells += ["–" if own is None else f"{own:,.0f}", "–" if not own or not best else f"{best / own:.1f}"]
        pearson = [value for value in r["critic_pearson"] if value is not None]
        table.add_row(
            name,
            written(r["rates"]),
            f"{r['before']:.3f}",
            f"{r['after']:.3f} ± {r['after_std']:.3f}",
            f"{r['short']:.2f}",
            f"{r['long']:.2f}",
            f"{r['mean_over_time']:.3f}",
            *cells,
            f"{np.mean(pearson):.2f}" if pearson else "–",
        )
    Console(width=170).print(table)


def show_cost(methods: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """One protocol's seconds, memory and noise."""
    table = Table(title=title)
    columns = (
        "method|s/iteration|iterations|responses|rollout|update|critic|MB|added|reward|var A|mean A²|A² at first"
    )
    for column in f"{columns}|grad norm|its var|its std/mean".split("|"):
        table.add_column(column, justify="right")
    signal = ["reward", "advantage_variance", "advantage_square", "early_advantage_square"]
    signal += ["grad_norm", "grad_norm_variance", "grad_norm_variation"]
    for name, r in _best_first(methods):
        table.add_row(
            name,
            f"{r['seconds_per_iteration']:.2f}",
            f"{r['iterations']:.0f}",
            f"{r['responses']:,.0f}",
            *(f"{r[share]:.1%}" for share in ("rollout", "update", "critic")),
            f"{r['peak_memory_mb']:.0f}",
            f"{r['added_memory_mb']:.0f}",
            *(f"{r[key]:.3f}" for key in signal),
        )
    Console(width=170).print(table)


def show_family(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the rest of the family learns, one run each."""
    table = Table(title="The rest of the family, one seed, same responses per iteration")
    for column in ("method", "rates", "before", "best", "after", "s/iteration"):
        table.add_column(column, justify="right")
    for name, r in _best_first(methods):
        best = max(r["curves"][0]["accuracy"])
        cells = [f"{value:.3f}" for value in (r["before"], best, r["after"])]
        table.add_row(name, written(r["rates"]), *cells, f"{r['seconds_per_iteration']:.2f}")
    Console(width=100).print(table)


def _best_first(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(methods.items(), key=lambda item: -item[1]["after"])
