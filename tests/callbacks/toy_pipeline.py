"""The smallest pipeline that is real: a trainer, a module of one parameter and a stage that recites."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.pipeline import Stage


def rollouts_of(responses: list[str], gold: str = "5") -> Rollouts:
    n = len(responses)
    return Rollouts(
        prompts=[Prompt(text="2+3=", gold=gold, dataset="sums", row=i) for i in range(n)],
        prompt_index=torch.arange(n),
        prompt_ids=torch.zeros(n, 2, dtype=torch.long),
        prompt_mask=torch.ones(n, 2),
        response_ids=torch.zeros(n, 3, dtype=torch.long),
        response_mask=torch.ones(n, 3),
        sampled_log_probs=torch.zeros(n, 3),
        responses=responses,
        finish_reasons=["stop"] * n,
        temperature=1.0,
        policy_versions=torch.zeros(n, dtype=torch.long),
    )


class Recites(Stage):
    """Provides the responses that the loader yields, in place of a policy."""

    provides = frozenset({"rollouts"})

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        batch.rollouts = rollouts_of([prompt.text for prompt in batch.prompts])


class Toy(LightningModule):
    """One parameter, updated `updates` times in each batch, and what the tests look at afterwards."""

    def __init__(self, updates: int = 1, reference: object = "a reference") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.updates = updates
        self.late_reference, self.reference = reference, None
        self.phase_seconds: dict[str, float] = {}
        self.seen: list[PromptBatch] = []
        self.refreshed_at: list[tuple[int, float]] = []

    def configure_model(self) -> None:
        self.reference = self.late_reference

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch)
        for _ in range(self.updates):
            self.weight.grad = torch.ones(())
            self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen.append(batch)

    def refresh_reference(self, mix: float) -> None:
        self.refreshed_at.append((self.trainer.global_step, mix))


def loader(*batches: list[str]) -> DataLoader[PromptBatch]:
    made = [
        PromptBatch(
            prompts=[Prompt(text=text, gold="5", dataset="sums", row=row) for row, text in enumerate(batch)],
            token_ids=[[0, 0] for _ in batch],
            visits=[0] * len(batch),
        )
        for batch in batches
    ]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def trainer_of(*callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    settings = (
        {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, "devices": 1} | quiet | settings
    )
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def fit(
    *callbacks: Any, batches: list[list[str]], module: Toy | None = None, **settings: Any
) -> tuple[Toy, Trainer]:
    module = module or Toy()
    trainer = trainer_of(Recites(), *callbacks, **settings)
    trainer.fit(module, loader(*batches))
    return module, trainer


class Scored(Verifier):
    """Scores a response by a function that the test gives."""

    def __init__(self, one: Callable[[str], Any] = float, **settings: Any) -> None:
        super().__init__(**settings)
        self.one = one

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [self.one(response) for response in responses]
