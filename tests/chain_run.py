"""Short runs on the chain task, on one rank or many: what they share, and what must not depend on the ranks."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import CHAIN_WORDS, TinyTokenCritic, make_chain_sppo, make_trainer
from transformers import PreTrainedTokenizerBase

from sppo_lightning.advantages import GAE, GroupAdvantage, LeaveOneOutAdvantage
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, Curriculum, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.models.sharding import whole
from sppo_lightning.models.tiny import word_tokenizer
from sppo_lightning.objectives import SequenceClipObjective

# Of weights. A key's bias has no gradient but rounding, which differs between CPUs, and AdamW divides it by its size:
# a step is 1e-3 there.
CLOSE = {"atol": 5e-6, "rtol": 0.0}


class ChainTokenCritic(TinyTokenCritic):
    """Reads the words of the chain task."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(CHAIN_WORDS.split())


class Parity(Verifier):
    """A reward that depends on prompt and response; no verdict for the prompts in `silent` places."""

    def __init__(self, silent: int = 0) -> None:
        super().__init__()
        self.silent = silent

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [
            None if self.silent and prompt.row % self.silent else float((len(text.split()) + prompt.row) % 2)
            for prompt, text in zip(prompts, responses, strict=True)
        ]


class Fated(Verifier):
    """The first 8 rows are always right, the next 8 always wrong, and chance decides the others."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [
            float(prompt.row < 8) if prompt.row < 16 else float(len(text) % 2)
            for prompt, text in zip(prompts, responses, strict=True)
        ]


def run(
    devices: int = 1,
    silent: int = 0,
    folder: Path | None = None,
    max_steps: int = 6,
    *callbacks: Callback,
    strategy: Any = "ddp_fork",
    samples: int = 1,
    batch_size: int = 8,
    prefetch: int = 0,
    ckpt_path: str | None = None,
    curriculum: Curriculum | None = None,
    trainer_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Three iterations of two updates, with two validations whose last batch is short; weights, all, and metrics.

    A rank of a distributed run that was started by other means gives its own, which are the same.
    """
    seed_everything(5, verbose=False)
    module = make_chain_sppo(1e-3, **{"micro_batch_tokens": 24} | settings)
    data = PromptDataModule(
        train=ChainTask({"1-3": 1.0}, size=24),
        validation={"few": ChainTask({"1-3": 1.0}, size=3, split="validation")},
        batch_size=batch_size,
        validation_batch_size=2,
        curriculum=curriculum,
        shuffle=curriculum is not None,
    )
    saved = [] if folder is None else [ModelCheckpoint(folder, f"{devices}", every_n_train_steps=max_steps)]
    trainer = make_trainer(
        RolloutGeneration(
            Sampling(max_new_tokens=8, samples_per_prompt=samples),
            validation=Sampling(max_new_tokens=8, samples_per_prompt=3),
            prefetch=prefetch,
        ),
        Parity(silent),
        *callbacks,
        *saved,
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        enable_checkpointing=bool(saved),
        **trainer_settings or {},
    )
    seed_everything(5, verbose=False)
    module.configure_model()  # before the fork, so that this process has the weights to receive the result
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    weights = {name: whole(weight) for name, weight in module.state_dict().items()}
    return weights, {name: float(value) for name, value in trainer.callback_metrics.items()}


def grpo() -> dict[str, Any]:
    """Four responses per prompt; KL in the loss, for which a reference is loaded."""
    return {"critic": None, "advantage": GroupAdvantage(), "mini_batch_size": 16, "kl_coef": 0.1, "samples": 4}


def rloo() -> dict[str, Any]:
    """Four responses per prompt, KL in the reward."""
    penalty = {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"}
    return {"critic": None, "advantage": LeaveOneOutAdvantage(), "mini_batch_size": 16, "samples": 4, **penalty}


def ppo() -> dict[str, Any]:
    """Advantages per token, whitened over all ranks."""
    return {"critic": ChainTokenCritic(), "advantage": GAE()}


def article() -> dict[str, Any]:
    """One ratio per response, against the reference."""
    return {"objective": SequenceClipObjective(normalize="none", against="reference")}


def check_same(one: tuple[dict[str, torch.Tensor], dict[str, float]], other: Any) -> None:
    """The same weights, and metrics of what is learned, whatever the ranks."""
    for name, value in one[0].items():
        torch.testing.assert_close(other[0][name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    groups = ("policy", "critic", "reward", "advantage", "val")
    lengths = ("rollout/response_tokens_mean", "rollout/truncated_fraction")
    compared = [name for name in one[1] if name.split("/")[0] in groups or name in lengths]
    assert {"policy/loss", "policy/grad_norm", "reward/mean", "val/few/avg@3"} <= set(compared)
    for name in compared:
        assert other[1][name] == pytest.approx(one[1][name], abs=5e-6, rel=1e-6, nan_ok=True), name
