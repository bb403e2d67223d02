"""A pipeline whose responses and rewards are given, and a monitor that watches it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from toy_pipeline import Recites, Scored, Toy, loader, trainer_of

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import HackingMonitor, Verifier
from sppo_lightning.verification.drift import Limits

SAYS = "because of this and that it has to be "  # 30 characters that a reader sees


def reward_of(response: str) -> float | None:
    """What stands before a bar, as in "1|0|text": the reward; "?" for no verdict."""
    word = response.split("|")[0]
    return None if word == "?" else float(word)


def check_of(response: str) -> float | None:
    """What stands before the second bar: the check's score."""
    word = response.split("|")[1]
    return None if word == "?" else float(word)


class Lengths(Recites):
    """Responses are as long, in tokens, as their words."""

    def process(self, batch: Any, trainer: Trainer, module: LightningModule) -> None:
        super().process(batch, trainer, module)
        words = [len(response.split()) for response in batch.rollouts.responses]
        mask = torch.zeros(len(words), max([1, *words]))
        for row, count in enumerate(words):
            mask[row, :count] = 1.0
        batch.rollouts.response_mask = mask


class Metrics(Callback):
    """What Lightning shows after each iteration and validation."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.iterations.append(self.shown(trainer))

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.validations.append(self.shown(trainer))

    @staticmethod
    def shown(trainer: Trainer) -> dict[str, float]:
        found = trainer.logged_metrics | trainer.callback_metrics
        return {k.removeprefix("hacking/"): float(v) for k, v in found.items() if k.startswith("hacking/")}


def watch(
    monitor: HackingMonitor,
    batches: Sequence[list[str]],
    held_out: Sequence[Any] = (),
    more: Sequence[Callback] = (),
    module: Toy | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[Metrics, Trainer]:
    """Fit on the batches; `held_out` are the batches of one validation set."""
    metrics = Metrics()
    callbacks = [Lengths(), Scored(reward_of, name="paid"), *more, metrics, monitor]
    trainer = trainer_of(*callbacks, **{"log_every_n_steps": 1} | settings)
    validation = [loader(*held_out)] if held_out else None
    trainer.fit(module or Toy(), loader(*batches), validation, ckpt_path=ckpt_path, weights_only=False)
    return metrics, trainer


def examples_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "hacking_examples.jsonl").read_text().splitlines()]


NO_LIMITS = Limits(None, None, None, None, None, None, None)


def monitor_of(folder: Path, *checks: Verifier, **settings: Any) -> HackingMonitor:
    return HackingMonitor(
        list(checks), **{"check_every_n_iterations": 1, "window": 2, "path": str(folder)} | settings
    )


def grader(**settings: Any) -> Scored:
    return Scored(check_of, **{"name": "grader"} | settings)


def alarms_of(caught: pytest.WarningsRecorder) -> list[str]:
    """The figures that were warned about, in order."""
    told = [str(warning.message) for warning in caught]
    return [text.split("`")[1] for text in told if text.startswith("At iteration")]


def graded(*rewards: str) -> list[str]:
    return [f"{reward}|?|{SAYS}{i}" for i, reward in enumerate(rewards)]


class Breaks(Verifier):
    """Fails on responses with an x, on all of a batch with a !, and returns nonsense for a y."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        if any("x" in response for response in responses):
            raise ValueError("what is \x1b[31m this?")
        return [2.0 if "y" in response else 1.0 for response in responses]
