"""Where the time of an iteration goes, by kind of operation: what is left to gain on the quickstart.

Sampling is `HFEngine`, the update is forward and backward of the policy's log-probabilities in micro-batches. The
matrix products are those of the model itself; beside them stands how long they would take at the speed of one large
product on this machine, below which no implementation gets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from engine_cases import chains, trained
from matplotlib.figure import Figure
from measuring import in_turns, save_figure, write_report
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from sppo_lightning.batch import Rollouts
from sppo_lightning.batching import micro_batches
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.models import CausalLMPolicy

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::mkldnn")
_ATTENTION = ("aten::_scaled_dot_product", "aten::bmm", "aten::_softmax", "aten::index_copy_", "aten::baddbmm")
KINDS = ("matrix products", "attention", "other operations", "Python")


def shares(task: Callable[[], object]) -> dict[str, float]:
    """The share of each of `KINDS`; Python is what lies between the operations, the profiler included."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        task()
        profiled = time.perf_counter() - start
    spent = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        if event.key.startswith("aten::"):
            products, attention = event.key.startswith(_PRODUCTS), event.key.startswith(_ATTENTION)
            kind = KINDS[0] if products else KINDS[1] if attention else KINDS[2]
            spent[kind] += event.self_cpu_time_total / 1e6
    spent[KINDS[3]] = max(profiled - sum(spent.values()), 0.0)
    return {kind: taken / sum(spent.values()) for kind, taken in spent.items()}


def counted(task: Callable[[], object], work: float) -> Callable[[], float]:
    """The task as one that returns how much it did, in FLOP."""

    def run() -> float:
        task()
        return work

    return run


def update(policy: CausalLMPolicy, rollouts: Rollouts, budget: int) -> None:
    """Forward and backward of all rows."""
    for rows in micro_batches(rollouts.lengths, budget):
        policy(rollouts.rows(rows))[0].sum().backward()
    policy.zero_grad()


def measure(prompts: int, samples: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Both halves of an iteration of `prompts` with so many responses each."""
    policy = trained(folder)
    engine, batch = HFEngine(), chains(prompts)(policy)
    engine.update_weights(policy, 0)
    sampling = Sampling(max_new_tokens=64, samples_per_prompt=samples)
    rollouts = engine.generate(batch, sampling)
    head = policy.head()["weight"].numel()
    blocks = sum(weight.numel() for weight in policy.parameters() if weight.ndim > 1) - head
    matrix = torch.randn(1024, 1024)
    prompt_tokens, drawn = sum(map(len, batch.token_ids)), int(rollouts.response_mask.sum())
    # 2 FLOP per weight and token forward, 4 backward; only tokens that are drawn meet the head
    work = {
        "sampling": 2 * (blocks * (prompt_tokens + drawn) + head * drawn),
        "update": 6 * (blocks * sum(rollouts.lengths) + head * drawn),
        "product": 2 * len(matrix) ** 3,
    }
    tasks: dict[str, Callable[[], object]] = {
        "sampling": lambda: engine.generate(batch, sampling),
        "update": lambda: update(policy, rollouts, 2048),
        "product": lambda: matrix @ matrix,
    }
    runs = {name: counted(task, work[name]) for name, task in tasks.items()}
    # FLOP/s of the fastest run: what disturbs a run only makes it longer
    speeds = {name: spread.greatest for name, spread in in_turns(runs, rounds).items()}
    return {
        name: {
            **shares(tasks[name]),
            "seconds": work[name] / speeds[name],
            "seconds at the machine's speed": work[name] / speeds["product"],
        }
        for name in ("sampling", "update")
    }


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """One bar for each half, cut by kind."""
    figure = Figure(figsize=(7, 2.2))
    axes = figure.subplots()
    left = [0.0] * len(found)
    for kind in KINDS:
        widths = [parts[kind] * parts["seconds"] for parts in found.values()]
        axes.barh(list(found), widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("seconds")
    axes.legend(ncols=len(KINDS), loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="responses per prompt")
    parser.add_argument("--rounds", type=int, default=7, help="runs of which the fastest counts")
    parser.add_argument("--warm-starts", type=Path, default=Path("runs/benchmarks/engines"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/floor.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.prompts, arguments.samples, arguments.rounds, arguments.warm_starts)
    table = Table(title="Where the time goes")
    for heading in ("", "seconds", *KINDS, "products at full speed"):
        table.add_column(heading, justify="right")
    for name, parts in found.items():
        least = parts["seconds at the machine's speed"] / parts["seconds"]
        cells = [f"{parts[kind]:.0%}" for kind in KINDS]
        table.add_row(name, f"{parts['seconds']:.2f}", *cells, f"{least:.0%}")
    Console(width=116).print(table)
    write_report(arguments.output, found)
    plot(found, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
