"""Runs in which the numbers of some prompts are not finite, and runs to compare them with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chain_run import Parity
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tiny import CHAIN_WORDS, TinyCritic, make_chain_sppo, make_trainer
from torch import Tensor

from sppo_lightning import SPPOModule
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.replay import CriticReplay
from sppo_lightning.shrinkage import ShrunkSequenceAdvantage

POISONED = 13  # a row of the second iteration's second mini-batch, of rank 1 where there are two

Spoil = Callable[[Tensor], Tensor]  # the log-probabilities [T] of a row


def to_nan(log_probs: Tensor) -> Tensor:
    return log_probs * float("nan")


def to_infinity(log_probs: Tensor) -> Tensor:
    """In the update alone, so that the ratio is clamped, and the loss and its gradient are finite."""
    return log_probs - float("inf") if log_probs.requires_grad else log_probs


def to_infinity_before(log_probs: Tensor) -> Tensor:
    """In the ratio's denominator alone, with the same effect."""
    return log_probs if log_probs.requires_grad else log_probs - float("inf")


def in_backward(log_probs: Tensor) -> Tensor:
    """Good values with a gradient that is none."""
    spoiled = log_probs * 1.0
    if spoiled.requires_grad:
        spoiled.register_hook(lambda gradient: gradient * float("nan"))
    return spoiled


class Poison(Callback):
    """Spoils what the policy says of some rows; what is sampled stays as it is."""

    def __init__(self, spoil: Spoil, rows: set[int]) -> None:
        self.spoil = spoil
        self.rows = rows

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def hook(module: Any, args: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            log_probs, entropy = outputs
            prompts = args[0].prompts
            rows = [self.spoil(r) if p.row in self.rows else r for p, r in zip(prompts, log_probs, strict=True)]
            return torch.stack(rows), entropy

        pl_module.policy.register_forward_hook(hook)  # type: ignore[union-attr, operator]


class PoisonedCritic(TinyCritic):
    """Spoils what the critic says of some prompts."""

    rows: frozenset[int] = frozenset()

    def prompt_outputs(self, prompts: Any, token_ids: Any) -> Tensor:
        outputs = super().prompt_outputs(prompts, token_ids)
        return outputs + torch.tensor([float("nan") if prompt.row in self.rows else 0.0 for prompt in prompts])


class Leaves(SPPOModule):
    """The reference: some updates, counted from 0, do not take place, without a look at any number."""

    left: frozenset[int] = frozenset()
    tried = 0

    def step_optimizer(self, modules: Any, attempt: Any) -> bool:
        self.tried += 1
        if self.tried - 1 in self.left:
            self.zero_grad()
            return False
        return super().step_optimizer(modules, attempt)


class Saves(Callback):
    """Keeps everything that a resumed run would begin with, and what was logged."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            self.logged = [*getattr(self, "logged", []), logged]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.file)
        if trainer.is_global_zero:
            torch.save(self.logged, self.file.with_suffix(".logged"))


def run(
    folder: Path, *callbacks: Callback, left: frozenset[int] = frozenset(), devices: int = 1, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Three iterations of two updates: what a checkpoint holds at the end, and what was logged in each."""
    seed_everything(5, verbose=False)
    critic = PoisonedCritic(words=CHAIN_WORDS)
    critic.rows = settings.pop("critic_rows", frozenset())
    memory = {"advantage": ShrunkSequenceAdvantage(), "critic_replay": CriticReplay(ratio=0.5)}
    made = make_chain_sppo(1e-2, critic=critic, lr_schedule="linear", micro_batch_tokens=40, **memory, **settings)
    made.__class__, made.left = Leaves, left  # type: ignore[assignment, attr-defined]
    made.configure_model()  # before a fork
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8, shuffle=False)
    folder.mkdir(exist_ok=True)
    more: dict[str, Any] = {"strategy": "ddp_fork"} if devices > 1 else {}
    trainer = make_trainer(
        RolloutGeneration(Sampling(max_new_tokens=8)),
        Parity(),
        *callbacks,
        Saves(folder / "end.ckpt"),
        devices=devices,
        max_steps=100,
        max_epochs=1,
        limit_val_batches=0,
        default_root_dir=folder,
        log_every_n_steps=1,
        **more,
    )
    trainer.fit(made, data)
    return torch.load(folder / "end.ckpt", weights_only=True), torch.load(folder / "end.logged")


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints are not the same, bit for bit."""
    if isinstance(one, dict):
        keys = list(dict.fromkeys([*one, *other]))
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list | tuple):
        pairs = [*zip(one, other, strict=False)]
        return [f"{path} length"] * (len(one) != len(other)) + [
            d for i, pair in enumerate(pairs) for d in differences(*pair, f"{path}/{i}")
        ]
    same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return [] if same else [path]


BESIDE = ("/skipped_updates", "/callbacks/Poison")
