"""Peak memory of the update: of log-probabilities over a large vocabulary, and of the critics.

The first table compares `selected_log_probs`, forward and backward with entropies, with the plain computation that
holds all logits. The second one is of whole runs with a critic as large as the policy, a small one, and one that
reads every token. Each measurement is a process of its own: its largest resident set (on CUDA what torch allocated)
less what it held before. The gradient of the output embedding counts for both computations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from measuring import save_figure, write_report
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sppo_lightning.cli import main as command
from sppo_lightning.figures.style import BLUE, GREY, ORANGE
from sppo_lightning.memory import Gauge
from sppo_lightning.models.log_probs import selected_log_probs
from sppo_lightning.models.tiny import word_tokenizer

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
_WORDS = r"0 1 2 3 4 5 6 7 8 9 +1 +2 +3 = ; \boxed{ } a b c d e f g h i j k l m n o p q r s t"
_NAIVE_COPIES = 3  # of the logits that the plain computation holds at its worst: for the decision to leave it out
_MODEL = {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 8}
_LARGE = {**_MODEL, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
_SMALL = {**_MODEL, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 512}
CRITICS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "no critic": None,
    "small critic": ("PromptCritic", _SMALL),
    "matched critic": ("PromptCritic", _LARGE),
    "token critic": ("TokenCritic", _LARGE),
}


def naive_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by way of all logits, as sparing as plain torch allows."""
    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)  # the logits are freed here
    with torch.no_grad():
        entropy = -log_p.exp().mul_(log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


METHODS = {"naive": naive_log_probs, "selected_log_probs": selected_log_probs}


def inputs(tokens: int, vocabulary: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, output embedding and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(0.02)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        targets.to(device),
    )


def gauge() -> Gauge:
    """The memory that is measured."""
    return Gauge(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def measure(method: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """One method forward and backward in this process: its peak and its seconds."""
    function = METHODS[method]
    hidden, weight, targets = inputs(tokens, vocabulary, hidden_size, torch.float32)
    # loads the kernels and starts the threads on a few rows and tokens, outside of what is measured
    few = torch.ones(2, 2, device=hidden.device, requires_grad=True)
    function(few, torch.ones(3, 2, device=hidden.device), targets[:2] % 3)[0].sum().backward()
    memory = gauge()
    before, start = memory.start(), time.perf_counter()
    log_probs, entropy = function(hidden, weight, targets)
    log_probs.mean().backward()
    total = (log_probs.sum() + entropy.sum()).item()  # waits for the GPU
    peak = (memory.peak() - before) / 2**20
    return {"peak_mb": peak, "seconds": time.perf_counter() - start, "sum": total}


def gradient_difference(vocabulary: int, hidden_size: int, dtype: torch.dtype, tokens: int = 256) -> float:
    """The largest difference between the two methods' gradients, relative to the largest gradient."""
    gradients = []
    for function in METHODS.values():
        hidden, weight, targets = inputs(tokens, vocabulary, hidden_size, dtype)
        function(hidden, weight, targets)[0].mean().backward()
        gradients.append((hidden.grad, weight.grad))
    pairs = zip(*gradients, strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def train(critic: str, folder: Path) -> dict[str, float]:
    """Two iterations of a whole run with a policy of random weights, in this process: the peak."""
    word_tokenizer(_WORDS.split()).save_pretrained(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(critic, folder)))
    memory = gauge()
    before = memory.start()
    command(["fit", "--config", str(path)])
    return {"peak_mb": (memory.peak() - before) / 2**20}


def config(critic: str, folder: Path) -> dict[str, Any]:
    """The run's settings: sixteen responses of 512 tokens, all of them one micro-batch."""
    kind = CRITICS[critic]
    made: dict[str, Any] = {
        "policy": _component("models.CausalLMPolicy", config=_LARGE, tokenizer=str(folder)),
        "critic": kind and _component(f"models.{kind[0]}", config=kind[1], tokenizer=str(folder)),
        "mini_batch_size": 16,
        "micro_batch_tokens": 16_384,
    }
    if kind is None:
        made["advantage"] = _component("advantages.BatchMeanAdvantage")
    elif kind[0] == "TokenCritic":
        made["advantage"] = _component("advantages.GAE")
    task = _component("data.ChainTask", operations={"2-4": 1}, size=64)
    sampling = {"temperature": 1.0, "max_new_tokens": 512}
    return {
        "seed_everything": 1,
        "model": _component("SPPOModule", **made),
        "data": _component("data.PromptDataModule", batch_size=16, train=task),
        "trainer": {
            "max_steps": 2,
            "default_root_dir": str(folder),
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "logger": False,
            "callbacks": [
                _component("callbacks.RolloutGeneration", sampling=sampling),
                _component("callbacks.ExactMatch"),
            ],
        },
    }


def _component(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"sppo_lightning.{name}", "init_args": settings}


def apart(*options: object) -> dict[str, float]:
    """What this script prints with these options, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, options)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, options))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method at every number of tokens, a row each; the plain one as far as the memory goes."""
    table = Table(title=f"Vocabulary {arguments.vocabulary:,}, hidden {arguments.hidden}, float32")
    for column in ("tokens", "naive", "selected_log_probs", "of naive", "seconds, naive", "seconds"):
        table.add_column(column, justify="right")
    rows = []
    for tokens in arguments.tokens:
        size = ["--tokens", tokens, "--vocabulary", arguments.vocabulary, "--hidden", arguments.hidden]
        needs = _NAIVE_COPIES * 4 * tokens * arguments.vocabulary / 2**30
        ours = apart("--measure", "selected_log_probs", *size)
        naive = apart("--measure", "naive", *size) if needs < arguments.limit_gib else None
        rows.append({"tokens": tokens, "selected_log_probs": ours, "naive": naive})
        if naive is None:
            plain = ["left out", "", ""]
        else:
            share = f"{ours['peak_mb'] / naive['peak_mb']:.1%}"
            plain = [f"{naive['peak_mb']:,.0f} MiB", share, f"{naive['seconds']:.1f}"]
        table.add_row(f"{tokens:,}", plain[0], f"{ours['peak_mb']:,.0f} MiB", *plain[1:], f"{ours['seconds']:.1f}")
    Console(width=120).print(table)
    return rows


def critics() -> dict[str, float]:
    """The peaks of runs that differ in their critics alone, MiB."""
    peaks = {}
    for name in CRITICS:
        with tempfile.TemporaryDirectory() as folder:
            peaks[name] = apart("--train", name, "--folder", folder)["peak_mb"]
    table = Table(title="Peak of a whole run, 25M-parameter policy, 16 responses of up to 512 tokens")
    for column in ("critic", "peak", "more than without a critic"):
        table.add_column(column, justify="right")
    for name, peak in peaks.items():
        table.add_row(name, f"{peak:,.0f} MiB", f"{peak / peaks['no critic'] - 1:+.0%}")
    Console(width=120).print(table)
    return peaks


def plot(rows: list[dict[str, Any]], peaks: dict[str, float], path: Path) -> None:
    """Peaks over tokens, and a bar per critic."""
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    for name, color in (("naive", GREY), ("selected_log_probs", BLUE)):
        measured = [row for row in rows if row[name]]
        peak = [row[name]["peak_mb"] / 2**10 for row in measured]
        left.plot([row["tokens"] for row in measured], peak, "o-", color=color, label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak of forward and backward, GiB")
    left.legend(frameon=False)
    right.barh(list(peaks), [peak / 2**10 for peak in peaks.values()], color=ORANGE)
    right.set_xlabel("peak of the run, GiB")
    save_figure(figure, path)


def main() -> None:
    """Parse the arguments, print the tables, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens in the vocabulary (Qwen2.5)")
    parser.add_argument("--hidden", type=int, default=64, help="width (896: Qwen2.5-0.5B)")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="the plain computation is left out beyond it")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/memory.json"))
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--train", choices=CRITICS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.tokens[0], arguments.vocabulary, arguments.hidden)))
    elif arguments.train:
        print(json.dumps(train(arguments.train, arguments.folder)))
    else:
        rows = compare(arguments)
        gradients = {
            str(dtype).split(".")[1]: gradient_difference(arguments.vocabulary, arguments.hidden, dtype)
            for dtype in (torch.float32, torch.float64)
        }
        print(f"Largest relative difference of the gradients: {gradients}")
        peaks = critics()
        report = {"vocabulary": arguments.vocabulary, "hidden": arguments.hidden, "log_probs": rows}
        write_report(arguments.output, {**report, "gradient_difference": gradients, "critics_mb": peaks})
        plot(rows, peaks, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
