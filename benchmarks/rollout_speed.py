"""Useful tokens per second of HFEngine against transformers' `generate()`, side by side on the same prompts.

Needs a trained policy, whose responses end at different lengths: the quickstart's warm start by default.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.data import ChainTask
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.models import CausalLMPolicy


def prompts(policy: CausalLMPolicy, count: int) -> PromptBatch:
    """Chains of 2 to 10 operations."""
    rows = ChainTask({"2-10": 1.0}, size=count, seed=3).rows()
    texts = [str(row["prompt"]) for row in rows]
    return PromptBatch(
        [
            Prompt(text, str(row["answer"]), "chains", i)
            for i, (text, row) in enumerate(zip(texts, rows, strict=True))
        ],
        policy.tokenizer(texts)["input_ids"],
        [0] * count,
    )


def generate(policy: CausalLMPolicy, batch: PromptBatch, tokens: int) -> int:
    """Sample with `generate()`; the number of response tokens up to and with the end-of-sequence token."""
    texts = [prompt.text for prompt in batch.prompts]
    inputs = policy.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids = policy.model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, temperature=1.0,
        top_k=0, top_p=1.0, max_new_tokens=tokens,
    )  # fmt: skip
    responses = ids[:, inputs["input_ids"].shape[1] :]
    ends = torch.isin(responses, torch.tensor(policy.eos_token_ids))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1])
    return int(lengths.sum())


def main() -> None:
    """Measure in turns, and report the median of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/quickstart/warm_start/model")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="runs/benchmarks/rollout_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = CausalLMPolicy(arguments.model)
    policy.build()
    batch = prompts(policy, arguments.prompts)
    engine = HFEngine()
    engine.update_weights(policy, 0)
    sampling = Sampling(max_new_tokens=arguments.tokens)
    speeds: dict[str, list[float]] = {"generate()": [], "HFEngine": []}
    for _ in range(arguments.rounds + 1):  # the first round warms up
        start = time.perf_counter()
        count = generate(policy, batch, arguments.tokens)
        speeds["generate()"].append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        tokens = float(engine.generate(batch, sampling).response_mask.sum())
        speeds["HFEngine"].append(tokens / (time.perf_counter() - start))
    medians = {name: sorted(values[1:])[arguments.rounds // 2] for name, values in speeds.items()}
    table = Table(title=f"{arguments.prompts} responses of up to {arguments.tokens} tokens, one thread")
    for column in ("sampler", "tokens per second", "ratio"):
        table.add_column(column, justify="right")
    for name, value in medians.items():
        table.add_row(name, f"{value:,.0f}", f"{value / medians['generate()']:.2f}")
    Console().print(table)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
