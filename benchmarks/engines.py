"""Useful tokens per second of every rollout engine against transformers' `generate()`, side by side.

Useful tokens are those of the responses, up to and with what ends them. All samplers run in one process, one after
the other, with the same model, prompts, lengths and number of threads; medians of the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from engine_cases import Case, cases
from matplotlib.figure import Figure
from measuring import Spread, in_turns, save_figure, write_report
from rich.console import Console
from rich.table import Table

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines import Engine, HFEngine, PagedEngine, Sampling, VLLMEngine
from sppo_lightning.figures.style import BLUE
from sppo_lightning.models import CausalLMPolicy

Sampler = Callable[[], float]  # samples all responses; the number of useful tokens


def generate(policy: CausalLMPolicy, batch: PromptBatch, sampling: Sampling, _: ExitStack) -> Sampler:
    """`generate()` of all prompts as one batch, padded on the left."""
    width = max(map(len, batch.token_ids))
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch.token_ids], device=policy.device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in batch.token_ids], device=policy.device
    )
    settings = {**_settings(policy, sampling), "max_new_tokens": sampling.max_new_tokens}
    ends = torch.tensor(policy.eos_token_ids, device=policy.device)

    def run() -> float:
        made = policy.model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:]
        stops = torch.isin(made, ends)
        lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, made.shape[1])
        return float(lengths.sum())

    return run


def engine_of(make: Callable[[], Engine]) -> Callable[..., Sampler]:
    """One of our engines, which is closed when the case is done."""

    def start(policy: CausalLMPolicy, batch: PromptBatch, sampling: Sampling, engines: ExitStack) -> Sampler:
        engine = make()
        engines.callback(engine.close)
        engine.update_weights(policy, 0)
        return lambda: float(sum(len(response.token_ids) for response in engine.stream(batch, sampling)))

    return start


def vllm_engine() -> Engine:
    """VLLMEngine, with what a CPU needs."""
    return VLLMEngine(max_model_len=1024, vllm={"kv_cache_memory_bytes": 2**29})


def _settings(policy: CausalLMPolicy, sampling: Sampling) -> dict[str, Any]:
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return {
        **(drawn if sampling.temperature else {"do_sample": False}),
        "num_return_sequences": sampling.samples_per_prompt,
        "pad_token_id": policy.tokenizer.pad_token_id,
    }


SAMPLERS = {
    "generate()": generate,
    "HFEngine": engine_of(HFEngine),
    "VLLMEngine": engine_of(vllm_engine),
    "PagedEngine": engine_of(PagedEngine),
}


def measure(case: Case, names: list[str], rounds: int) -> dict[str, Spread]:
    """Useful tokens per second of each engine on one case."""
    policy = case.policy()
    batch = case.prompts(policy)
    with ExitStack() as engines:
        return in_turns({name: SAMPLERS[name](policy, batch, case.sampling, engines) for name in names}, rounds)


def show(results: dict[str, dict[str, Spread]]) -> None:
    """A row per case; ratios are to `generate()`."""
    table = Table(title="Useful tokens per second: median (least to greatest)")
    table.add_column("case")
    for name in SAMPLERS:
        table.add_column(name, justify="right")
    for case, speeds in results.items():
        base = speeds["generate()"].median
        cells = [
            f"{speeds[name]}\n× {speeds[name].median / base:.2f}" if name in speeds else "–" for name in SAMPLERS
        ]
        table.add_row(case, *cells)
    Console(width=130).print(table)


def plot(results: dict[str, dict[str, Spread]], path: Path) -> None:
    """Bars of HFEngine's ratio to `generate()`, a case each."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    ratios = {case: speeds["HFEngine"].median / speeds["generate()"].median for case, speeds in results.items()}
    axes.barh(list(ratios)[::-1], list(ratios.values())[::-1], color=BLUE)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("useful tokens per second of HFEngine, `generate()` = 1")
    save_figure(figure, path)


def main() -> None:
    """Measure, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each sampler, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default="", help="only the cases with this in their name")
    parser.add_argument("--paged", action="store_true", help="also PagedEngine, which takes minutes on a CPU")
    parser.add_argument("--vllm", action="store_true", help="also VLLMEngine, in an environment that has vLLM")
    parser.add_argument("--warm-starts", type=Path, default=Path("runs/benchmarks/engines"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/engines.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    left_out = {"PagedEngine": not arguments.paged, "VLLMEngine": not arguments.vllm}
    names = [name for name in SAMPLERS if not left_out.get(name)]
    results = {}
    for case in cases(arguments.warm_starts):
        if arguments.cases in case.name:
            results[case.name] = measure(case, names, arguments.rounds)
            ratio = results[case.name]["HFEngine"].median / results[case.name]["generate()"].median
            print(f"{case.name}: × {ratio:.2f}", flush=True)
    show(results)
    rows = {case: {name: vars(spread) for name, spread in speeds.items()} for case, speeds in results.items()}
    write_report(arguments.output, {"tokens_per_second": rows})
    plot(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
