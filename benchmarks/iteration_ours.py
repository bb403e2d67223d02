"""What `iteration.py` adds to a run of this project: the shared reward as a verifier, and a clock."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from iteration_rewards import REWARDS
from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import Verifier
from sppo_lightning.memory import peak_memory


class SharedReward(Verifier):
    """One of the rewards that both sides give.

    Args:
        kind: Its name in `iteration_rewards.REWARDS`.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(self, kind: str = "exact match", **settings: Any) -> None:
        super().__init__(**settings)
        self.reward = REWARDS[kind]

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """The reward of each response."""
        return [self.reward(prompt.gold, text) for prompt, text in zip(prompts, responses, strict=True)]


class IterationClock(Callback):
    """Writes the seconds of each iteration, by phase, and the peak of memory to a JSON file; the last callback.

    An iteration lasts from the end of the one before to its own, with all that the trainer does in between.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.iterations: list[dict[str, float]] = []
        self.lengths: list[float] = []
        self.taught: list[float] = []
        self._before = self._cpu_before = 0.0
        self._start_mb = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; until here the peak is of what was imported and loaded."""
        self._start_mb = peak_memory()["peak_mb"]
        self._before, self._cpu_before = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the time of an iteration."""
        now, cpu = time.perf_counter(), time.process_time()
        phases: Any = pl_module.last_phase_seconds
        times = {"seconds": now - self._before, "cpu_seconds": cpu - self._cpu_before}
        self._before, self._cpu_before = now, cpu
        self.iterations.append({**times, "sample": phases["rollout"], "verify": phases["verify"]})
        self.lengths.append(float(batch.rollouts.response_mask.sum(1).mean()))
        self.taught.append(float(trainer.callback_metrics["advantage/nonzero_fraction"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        result = {
            "iterations": self.iterations,
            "updates": trainer.global_step,
            "response_tokens": statistics.mean(self.lengths),
            "with_advantage": statistics.mean(self.taught),
            "start_mb": self._start_mb,
            "peak_mb": peak_memory()["peak_mb"],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        self.path.write_text(json.dumps(result))
