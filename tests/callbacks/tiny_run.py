"""A whole run of a policy of one block and 16 channels: data, sampling, verifier, critic and trainer, all real."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Trainer

from sppo_lightning import SFTModule, SPPOModule
from sppo_lightning.base import PolicyModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.models import PromptCritic, TinyPolicy
from sppo_lightning.models.tiny import word_tokenizer
from sppo_lightning.optim import GroupOptimizer

WORDS = r"0 1 2 3 4 5 6 7 8 9 +1 +2 +3 = ; \boxed{ } a b c d e f g h i j k l m n o p q r s t"


class FewDigits(Verifier):
    """Share of words that are no digits: what random weights get neither all right nor all wrong."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        words = [response.split() for response in responses]
        return [sum(not word.isdigit() for word in row) / max(len(row), 1) for row in words]


def policy() -> TinyPolicy:
    return TinyPolicy(WORDS, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)


def rl_module(folder: Path, critic: bool = True, **settings: Any) -> SPPOModule:
    """SPPO with two updates per iteration and, if wanted, a critic; without one the advantage is the reward."""
    word_tokenizer(WORDS.split()).save_pretrained(folder / "tokenizer")
    backbone = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape = {"num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}
    settings = {
        "policy_optimizer": GroupOptimizer(lr=1e-2),
        "critic_optimizer": GroupOptimizer(lr=1e-2),
        "mini_batch_size": 8,
        **settings,
    }
    value = PromptCritic(tokenizer=str(folder / "tokenizer"), config={**backbone, **shape}) if critic else None
    return SPPOModule(policy(), value, **settings)


def sft_module() -> SFTModule:
    return SFTModule(policy(), GroupOptimizer(lr=1e-2))


def data(sets: tuple[str, ...] = ("short", "long"), demonstrations: bool = False) -> PromptDataModule:
    """64 training prompts, 16 in an iteration; 8 prompts in each validation set."""
    lengths = {"short": "1", "long": "3"}
    validation: Any = {name: ChainTask({lengths[name]: 1}, 8, "validation") for name in sets}
    train = ChainTask({"1-3": 1}, 64, demonstrations=demonstrations)
    return PromptDataModule(train, validation, batch_size=16, validation_batch_size=8, seed=3)


def stages() -> list[Any]:
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    twice = Sampling(temperature=1.0, max_new_tokens=6, samples_per_prompt=2)
    return [RolloutGeneration(sampling, twice, validation_greedy=True), FewDigits()]


def trainer_of(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    """A trainer with the stages, then `callbacks`; validates after every second iteration."""
    settings = {
        "max_epochs": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        **settings,
    }
    return Trainer(
        accelerator="cpu",
        devices=1,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*stages(), *callbacks],
        **settings,
    )


def fit(
    folder: Path, *callbacks: Any, module: PolicyModule | None = None, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    """Train with the same seed whatever ran before."""
    lightning.seed_everything(1, verbose=False)
    trainer = trainer_of(folder, *callbacks, **settings)
    module = rl_module(folder) if module is None else module
    trainer.fit(module, data(demonstrations=isinstance(module, SFTModule)), ckpt_path=ckpt_path)
    return trainer
