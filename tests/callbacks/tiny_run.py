"""A run that is real and takes a second: a policy of one layer, prompts of one word, answers of one word."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import PromptDataModule, PromptSource
from sppo_lightning.engines import Sampling
from sppo_lightning.models import LoRA, PromptCritic, TinyPolicy
from sppo_lightning.module import SPPOModule
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.sft import SFTModule

WORDS = "a b c d e f g h"


class Words(PromptSource):
    """`size` prompts of two words, `a` being right for each of them."""

    origin = "Words"

    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def rows(self) -> list[Mapping[str, Any]]:
        words = WORDS.split()
        texts = [f"{words[i % 8]} {words[i // 8 % 8]}" for i in range(self.first, self.first + self.size)]
        return [{"prompt": text, "answer": "a", "demonstration": "a"} for text in texts]


class FirstWord(Verifier):
    """Right where the response begins with the gold answer."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(r.split()[:1] == [p.gold]) for p, r in zip(prompts, responses, strict=True)]


class ByRow(Verifier):
    """A score that the prompt's row decides, whatever the response."""

    def __init__(self, score_of: Callable[[int], float | None]) -> None:
        super().__init__()
        self.score_of = score_of

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [self.score_of(prompt.row) for prompt in prompts]


class Recorder(Callback):
    """What Lightning itself shows after each iteration and validation."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.iterations: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.phases: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.iterations.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.phases.append(dict(pl_module.last_phase_seconds))  # type: ignore[arg-type]
        if len(self.iterations) == self.stop_at:
            raise RuntimeError("the machine went away")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.validations.append({k: float(v) for k, v in metrics.items() if k.startswith("val/")})


def policy(lora: LoRA | None = None, words: str = WORDS) -> TinyPolicy:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_tokens": 16}
    return TinyPolicy(words, **sizes, lora=lora)


def sppo(
    folder: Path, learning_rate: float = 0.02, lora: LoRA | None = None, words: str = WORDS, **settings: Any
) -> SPPOModule:
    """With a critic whose tokenizer is saved in `folder`; two updates per iteration of 8 responses."""
    seed_everything(3, verbose=False)
    made = policy(lora, words)
    made.tokenizer.save_pretrained(folder)
    config = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    optimizer = GroupOptimizer(lr=learning_rate)
    return SPPOModule(
        made,
        PromptCritic(tokenizer=str(folder), config=config | heads, lora=lora),
        policy_optimizer=optimizer,
        critic_optimizer=optimizer,
        mini_batch_size=4,
        **settings,
    )


def sft() -> SFTModule:
    seed_everything(3, verbose=False)
    return SFTModule(policy(), GroupOptimizer(lr=0.02))


def data(validation: tuple[str, ...] = ("easy", "hard"), size: int = 32) -> PromptDataModule:
    """Batches of 8 prompts, and validation sets of 8 prompts each."""
    sets: dict[str, str | PromptSource] = {name: Words(8, 32 + 8 * i) for i, name in enumerate(validation)}
    return PromptDataModule(Words(size), sets, batch_size=8, validation_batch_size=8, seed=5)


def stages(verifier: Verifier | None = None) -> list[Callback]:
    training = Sampling(max_new_tokens=2)
    validation = Sampling(max_new_tokens=2, samples_per_prompt=2)
    return [RolloutGeneration(training, validation, validation_greedy=True), verifier or FirstWord()]


def trainer_of(callbacks: list[Callback], **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
    }
    bar = {} if any("Progress" in type(c).__name__ for c in callbacks) else {"enable_progress_bar": False}
    return Trainer(callbacks=callbacks, **(defaults | bar | settings))


def weights(module: LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])
