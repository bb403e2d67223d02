"""What a run has come to so far, for those who get its model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer

from sppo_lightning.data.sources import is_hub_id
from sppo_lightning.engines import Sampling


@dataclass
class RunRecord:
    """Counts and results, in numbers and text alone; saved in checkpoints as `record`."""

    updates: int = 0
    samples: int = 0  # responses (or demonstrations) learned from, over all ranks
    validation: dict[str, float] = field(default_factory=dict)  # metrics of the last validation, by name
    sampling: dict[str, Any] = field(default_factory=dict)  # how responses are sampled in validation
    datasets: list[str] = field(default_factory=list)  # hub ids of the training data
    prompts: dict[str, str] = field(default_factory=dict)  # `system_prompt` and `suffix` of the data, where set

    def describe(self, trainer: Trainer) -> None:
        """Note what the run learns from, and how it is validated."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            sampling = getattr(callback, "validation", None) or getattr(callback, "sampling", None)
            if isinstance(sampling, Sampling):
                self.sampling = dataclasses.asdict(sampling)
        data = getattr(trainer, "datamodule", None)
        texts = {name: getattr(data, name, None) for name in ("system_prompt", "suffix")}
        self.prompts = {name: text for name, text in texts.items() if isinstance(text, str)}
        train = getattr(data, "train", None)
        path = train if isinstance(train, str) else getattr(train, "path", None)
        self.datasets = [path] if isinstance(path, str) and is_hub_id(path) else []

    def count(self, trainer: Trainer, samples: int) -> None:
        """Add an iteration that has learned from `samples` over all ranks."""
        self.updates = trainer.global_step
        self.samples += samples

    def resume(self, earlier: RunRecord) -> None:
        """Go on from the counts and results of the run before."""
        self.updates, self.samples, self.validation = earlier.updates, earlier.samples, earlier.validation
