"""Peak memory and time of token log-probabilities over a large vocabulary, forward and backward.

Compares `selected_log_probs` with the plain computation that holds all logits. Each measurement runs in a
process of its own: the peak is the process's largest resident set (ru_maxrss) minus its resident set just
before the computation, when the inputs are in memory. The gradient of the output embedding counts for both.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sppo_lightning.models.log_probs import selected_log_probs


def naive_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by way of all logits, as sparing as plain torch allows."""
    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)  # the logits are freed here
    with torch.no_grad():
        entropy = -log_p.exp().mul_(log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


METHODS = {"naive": naive_log_probs, "selected_log_probs": selected_log_probs}


def resident_mib() -> float:
    """The memory this process holds now, MiB (its largest so far where the system does not tell)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mib()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**10


def peak_mib() -> float:
    """The most memory this process has held, MiB; Linux counts it in KiB, macOS in bytes."""
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(method: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """Run one method forward and backward in this process; its peak, seconds and results to compare."""
    function = METHODS[method]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    # Loads the kernels and starts the threads on a few rows and tokens, outside of what is measured.
    function(torch.ones(2, 2, requires_grad=True), torch.ones(3, 2), targets[:2] % 3)[0].sum().backward()
    before, start = resident_mib(), time.perf_counter()
    log_probs, entropy = function(hidden, weight, targets)
    log_probs.mean().backward()
    seconds = time.perf_counter() - start
    assert weight.grad is not None
    return {
        "peak_mib": peak_mib() - before,
        "seconds": seconds,
        "log_prob_mean": log_probs.mean().item(),
        "entropy_mean": entropy.mean().item(),
        "weight_grad_norm": weight.grad.norm().item(),
    }


def measure_apart(method: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    sizes = ["--tokens", tokens, "--vocabulary", vocabulary, "--hidden", hidden_size]
    command = [sys.executable, __file__, "--measure", method, *map(str, sizes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare(tokens: int, vocabulary: int, hidden_size: int) -> dict[str, object]:
    """Measure every method at one hidden size and print a row for each."""
    results = {name: measure_apart(name, tokens, vocabulary, hidden_size) for name in METHODS}
    naive, ours = results["naive"], results["selected_log_probs"]
    for key in ("log_prob_mean", "entropy_mean", "weight_grad_norm"):
        if abs(naive[key] - ours[key]) > 1e-4 * abs(naive[key]):
            raise RuntimeError(f"the methods disagree on {key}: {naive[key]} and {ours[key]}")
    for name, result in results.items():
        share, seconds = result["peak_mib"] / naive["peak_mib"], result["seconds"]
        print(
            f"{hidden_size:>6}  {name:<20}{result['peak_mib']:>10,.0f}{share:>10.3f}{seconds:>9.1f}",
            flush=True,
        )
    ratio = ours["peak_mib"] / naive["peak_mib"]
    return {"hidden": hidden_size, **results, "peak_ratio": ratio}


def main() -> None:
    """Parse the arguments, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="response tokens")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens in the vocabulary (Qwen2.5)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 896], help="hidden sizes (896: Qwen2.5-0.5B)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/log_prob_memory.json"))
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.tokens, args.vocabulary, args.hidden[0])))
        return
    print(f"{args.tokens:,} tokens, vocabulary {args.vocabulary:,}, float32, forward and backward\n")
    print(f"{'hidden':>6}  {'method':<20}{'peak MiB':>10}{'of naive':>10}{'seconds':>9}")
    report = {
        "tokens": args.tokens,
        "vocabulary": args.vocabulary,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": [compare(args.tokens, args.vocabulary, hidden) for hidden in args.hidden],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
