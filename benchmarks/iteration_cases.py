"""What `iteration.py` compares: the sides, the cases, and how a run of each is started."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from race_runs import BASELINES, QUICKSTART, quiet_environment, warm_model, warm_start
from transformers import Qwen2Config, Qwen2ForCausalLM

from sppo_lightning.config_files import merge, read
from sppo_lightning.data import ChainTask
from sppo_lightning.models.tiny import word_tokenizer

SIDES = ("TRL, GRPO", "ours, GRPO", "ours, SPPO")
TRL, GRPO, SPPO = SIDES
SEED, THREADS, LR = 1, 1, 1e-6  # a rate at which the policy stays what it is, so that all iterations cost the same
_SAMPLES = 8  # per prompt in GRPO; SPPO's is 1
_FORWARD_TOKENS = 2560  # of TRL's micro-batches, about as many as ours
_WORDS, _PROMPT_WORDS = [f"w{i}" for i in range(1020)], (8, 24)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: In the table.
        group: Cases that are shown and plotted together.
        prompts: Of an iteration; both sides read the same ones in the same order.
        tokens: Most tokens of a response.
        width: Of a model from scratch whose responses never end; None for the quickstart's warm start.
        layers: Of that model.
        updates: Per iteration.
        reward: By its name in `iteration_rewards.REWARDS`.
        iterations: That are counted.
        warm_up: Iterations before them.
    """

    name: str
    group: str
    prompts: int = 32
    tokens: int = 64
    width: int | None = None
    layers: int = 3
    updates: int = 2
    reward: str = "coin"
    iterations: int = 3
    warm_up: int = 1

    def samples(self, side: str) -> int:
        """Responses per prompt."""
        return 1 if side == SPPO else _SAMPLES

    def responses(self, side: str) -> int:
        """Responses per iteration."""
        return self.prompts * self.samples(side)

    def model(self, folder: Path) -> Path:
        """The checkpoint that all sides start from, made where it is not there."""
        if self.width is None:
            warm_start(folder, SEED)
            return warm_model(folder.resolve(), SEED)
        return endless_model(folder.resolve() / "models" / f"{self.width}x{self.layers}", self.width, self.layers)


def all_cases() -> list[Case]:
    """The quickstart's iteration, then longer responses, then larger models."""
    group = "the quickstart's model"
    quickstart = [
        Case("as it is", group, reward="exact match", iterations=5),
        Case("all responses teach", group, iterations=5),
        Case("all teach, one update", group, updates=1, iterations=5),
    ]
    # fewer responses where each is longer; a size that both groups need is measured once
    lengths = [(64, 32, 3, 1), (256, 8, 3, 1), (1024, 4, 1, 1), (4096, 2, 1, 0)]
    sizes = [(64, 2, 32), (256, 4, 16), (512, 6, 8)]
    return [
        *quickstart,
        *(Case(f"{n} tokens", "response length", p, n, 128, iterations=i, warm_up=w) for n, p, i, w in lengths),
        *(Case(f"{w} wide, {d} deep", "model size", p, 64, w, d, iterations=2) for w, d, p in sizes),
    ]


def short_cases() -> list[Case]:
    """A check that everything runs, not a result."""
    return [Case("64 tokens", "a check, no result", 8, 64, 128, iterations=2)]


def endless_model(folder: Path, width: int, layers: int) -> Path:
    """A Qwen2 with random weights, whose end-of-sequence id lies behind its vocabulary: no response ends early."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(SEED)
    tokenizer = word_tokenizer([*_WORDS, "<end>"])
    tokenizer.eos_token = "<end>"
    config = Qwen2Config(
        vocab_size=tokenizer.eos_token_id,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(case: Case, count: int) -> list[dict[str, Any]]:
    """Prompts and answers: chains of the quickstart's task, or random words."""
    if case.width is None:
        return [dict(row) for row in ChainTask({"2-10": 1.0}, size=count, seed=SEED).rows()]
    rng = random.Random(SEED)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(*_PROMPT_WORDS))) for _ in range(count)]
    return [{"prompt": text, "answer": "w0"} for text in texts]


def run(case: Case, side: str, folder: Path, peer: str) -> dict[str, Any]:
    """One run in a process of its own; what it took, the iterations that warm up left out."""
    target = folder.resolve() / "run"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    iterations = case.warm_up + case.iterations
    rows = prompts(case, case.prompts * iterations)
    lines = [json.dumps({name: row[name] for name in ("prompt", "answer")}) for row in rows]
    (target / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    model = str(case.model(folder))
    if side == TRL:
        (target / "settings.json").write_text(json.dumps(_trl_settings(case, model, target, iterations)))
        _start([peer, str(Path(__file__).with_name("iteration_trl.py")), "settings.json"], target)
    else:
        (target / "config.yaml").write_text(yaml.safe_dump(_config(case, side, model, iterations)))
        _start([sys.executable, "-m", "sppo_lightning", "fit", "--config", "config.yaml"], target)
    result: dict[str, Any] = json.loads((target / "result.json").read_text())
    assert result["updates"] == case.updates * iterations
    assert len(result["iterations"]) == iterations
    return {**result, "iterations": result["iterations"][case.warm_up :]}


def _start(command: list[str], folder: Path) -> None:
    environment = quiet_environment(THREADS)
    with (folder / "output.txt").open("w") as output:
        status = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output).returncode
    if status:
        lines = (folder / "output.txt").read_text().splitlines()
        sys.exit(f"{lines[-1] if lines else command}\nA run failed with status {status}; see {output.name}.")


def _trl_settings(case: Case, model: str, target: Path, iterations: int) -> dict[str, Any]:
    rows = case.responses(TRL) // case.updates
    while rows > 1 and rows * (_PROMPT_WORDS[0] + case.tokens) > _FORWARD_TOKENS:
        rows //= 2
    return {
        "model": model,
        "data": "prompts.jsonl",
        "folder": str(target / "trl"),
        "output": "result.json",
        "prompts": case.prompts,
        "samples": case.samples(TRL),
        "updates": case.updates,
        "rows": rows,
        "tokens": case.tokens,
        "temperature": 1.0,
        "reward": case.reward,
        "iterations": iterations,
        "lr": LR,
        "seed": SEED,
        "threads": THREADS,
    }


def _config(case: Case, side: str, model: str, iterations: int) -> dict[str, Any]:
    """The quickstart's config, for GRPO the baseline's on top, and on it what makes both sides alike."""
    names = [QUICKSTART / "sppo.yaml", *([BASELINES / "grpo.yaml"] if side == GRPO else [])]
    made: Any = merge([*(read(str(name)) for name in names), _overlay(case, side, iterations)])
    sampled: Any = "sppo_lightning.callbacks.RolloutGeneration"
    [generation] = [each for each in made["trainer"]["callbacks"] if each["class_path"] == sampled]
    made["trainer"]["callbacks"] = [
        generation,
        {"class_path": "iteration_ours.SharedReward", "init_args": {"kind": case.reward}},
        {"class_path": "iteration_ours.IterationClock", "init_args": {"path": "result.json"}},
    ]
    made["trainer"].pop("max_time")
    return yaml.safe_load(yaml.safe_dump(made).replace("runs/quickstart/warm_start/model", model))


def _overlay(case: Case, side: str, iterations: int) -> Mapping[str, Any]:
    optimizer = {"lr": LR, "warmup_updates": 0}
    settings: dict[str, Any] = {
        "policy_optimizer": optimizer,
        "mini_batch_size": case.responses(side) // case.updates,
    }
    if side == SPPO:
        settings["critic_optimizer"] = optimizer
        if case.width is not None:  # as the quickstart's is to its policy
            sizes = {"hidden_size": case.width // 2, "intermediate_size": case.width}
            layers = {"num_hidden_layers": max(1, 2 * case.layers // 3), "max_position_embeddings": 8192}
            critic = "sppo_lightning.models.PromptCritic"
            settings["critic"] = {"class_path": critic, "init_args": {"config": {**sizes, **layers}}}
    generation = {"sampling": {"temperature": 1.0, "max_new_tokens": case.tokens}}
    return {
        "seed_everything": SEED,
        "threads": THREADS,
        "model": {"init_args": settings},
        "data": {
            "init_args": {
                "batch_size": case.prompts,
                "train": "prompts.jsonl",
                "validation": None,
                "shuffle": False,
            }
        },
        "trainer": {
            "max_steps": case.updates * iterations,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": ".",
            "callbacks": [
                {"class_path": "sppo_lightning.callbacks.RolloutGeneration", "init_args": generation},
            ],
        },
    }
