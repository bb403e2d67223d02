"""How fast critics learn what a fixed policy can do: size, start, learning rate, warm-up, replay.

A warm start of the race answers each prompt once. Every critic goes through these outcomes once, in the order and
in the mini-batches of a run, and says V before it learns from them. Its Brier skill, 1 − mean (R − V)² / var R, is
the share of the batch mean's squared error that it removes; below 0 a constant would do better. So the table
shows what SPPO's baseline is worth at an iteration, without the noise of different policies.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chains import chains, sample
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sppo_lightning.batch import Prompt
from sppo_lightning.models import CausalLMPolicy, CharacterCritic, PromptCritic
from sppo_lightning.optim import GroupOptimizer, build_optimizer

PROMPTS, UPDATES = 256, 2  # of an iteration, as in the quickstart
SHOWN = (1, 2, 3, 5, 8, 12, 16, 24)  # iterations


@dataclass(frozen=True)
class Variant:
    """A critic and how it learns; `settings` are PromptCritic's, beside the policy's tokenizer."""

    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    warmup_updates: int = 0
    replay: int = 0  # stored prompts per fresh one
    characters: bool = False


def qwen(hidden: int) -> dict[str, Any]:
    """Settings of a critic of two layers from scratch."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    return {"config": {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 4, **sizes}}


def variants(policy: str) -> dict[str, Variant]:
    """What is compared."""
    return {
        "quickstart: lr 1e-3, warm-up of 10 updates": Variant(1e-3, qwen(64), warmup_updates=10),
        "lr 1e-3": Variant(1e-3, qwen(64)),
        "lr 2e-3": Variant(2e-3, qwen(64)),
        "lr 4e-3": Variant(4e-3, qwen(64)),
        "lr 2e-3, replay of 1": Variant(2e-3, qwen(64), replay=1),
        "lr 2e-3, replay of 3": Variant(2e-3, qwen(64), replay=3),
        "lr 2e-3, a quarter of the size": Variant(2e-3, qwen(32)),
        "lr 2e-3, starts as the policy": Variant(2e-3, {"pretrained": policy}),
        "lr 2e-2, the policy frozen, a new head": Variant(2e-2, {"pretrained": policy, "freeze_backbone": True}),
        "lr 2e-3, GPT-2 that reads characters": Variant(2e-3, characters=True),
    }


def outcomes(policy: CausalLMPolicy, iterations: int) -> tuple[list[Prompt], Tensor]:
    """Prompts, and whether the policy's one response to each is right, 1.0 or 0.0."""
    batch = chains(policy, PROMPTS * iterations, "train", seed=1)
    return batch.prompts, sample(policy, batch, 1)[1].float()


def skills(variant: Variant, tokenizer: str, prompts: list[Prompt], rewards: Tensor) -> tuple[list[float], float]:
    """Brier skill of each iteration, before its updates, and seconds per iteration."""
    torch.manual_seed(0)
    own: dict[str, Any] = {} if "pretrained" in variant.settings else {"tokenizer": tokenizer}
    critic = CharacterCritic() if variant.characters else PromptCritic(**own, **variant.settings)
    critic.build()
    settings = GroupOptimizer(lr=variant.lr, weight_decay=0.0, warmup_updates=variant.warmup_updates)
    optimizer, schedule = build_optimizer({"critic": (critic, settings)}, "constant", -1)
    found, start = [], time.perf_counter()
    for first in range(0, len(prompts), PROMPTS):
        with torch.no_grad():
            values = critic(prompts[first : first + PROMPTS]).sigmoid()
        truth = rewards[first : first + PROMPTS]
        found.append(1 - float((truth - values).square().mean() / truth.var(unbiased=False)))
        for begin in range(first, first + PROMPTS, PROMPTS // UPDATES):
            fresh = list(range(begin, begin + PROMPTS // UPDATES))
            old = torch.randint(first, (variant.replay * len(fresh),)).tolist() if first and variant.replay else []
            for rows in filter(None, (fresh, old)):
                logits = critic([prompts[i] for i in rows])
                torch.nn.functional.binary_cross_entropy_with_logits(logits, rewards[rows]).backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return found, (time.perf_counter() - start) / (len(prompts) // PROMPTS)


def main() -> None:
    """Measure every variant on every warm start, and print the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="warm starts, folders of models")
    parser.add_argument("--iterations", type=int, default=max(SHOWN), help="of the quickstart's size")
    parser.add_argument("--json", type=Path, default=Path("runs/critic_learning.json"), help="where numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, list[tuple[list[float], float]]] = {}
    for model in map(str, arguments.models):
        policy = CausalLMPolicy(model)
        policy.build()
        data = outcomes(policy, arguments.iterations)
        for name, variant in variants(model).items():
            measured.setdefault(name, []).append(skills(variant, model, *data))
    shown = [i for i in SHOWN if i <= arguments.iterations]
    table = Table(title=f"Brier skill at an iteration, mean of {len(arguments.models)} warm starts")
    for column in ("critic", *map(str, shown), "mean", "s/iteration"):
        table.add_column(column, justify="left" if column == "critic" else "right")
    for name, runs in measured.items():
        mean = torch.tensor([found for found, _ in runs]).mean(0)
        seconds = sum(each for _, each in runs) / len(runs)
        cells = [f"{mean[i - 1]:.2f}" for i in shown]
        table.add_row(name, *cells, f"{mean.mean():.2f}", f"{seconds:.2f}")
    Console(width=120).print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
