"""One process or two: the same losses, weights and validation metrics."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from test_resume import CHAIN_WORDS
from tiny import make_critic

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.models import TinyPolicy
from sppo_lightning.optim import GroupOptimizer


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


def run(devices: int, silent: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    seed_everything(5, verbose=False)
    rate = GroupOptimizer(lr=1e-3)
    module = SPPOModule(
        TinyPolicy(CHAIN_WORDS, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
        make_critic(words=CHAIN_WORDS),
        policy_optimizer=rate,
        critic_optimizer=rate,
        mini_batch_size=4,
        micro_batch_tokens=24,
    )
    data = PromptDataModule(
        train=ChainTask({"1-3": 1.0}, size=24),
        validation={"few": ChainTask({"1-3": 1.0}, size=3, split="validation")},
        batch_size=8,
        validation_batch_size=2,
        shuffle=False,
    )
    settings: dict[str, Any] = {"strategy": "ddp_fork"} if devices > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        callbacks=[
            RolloutGeneration(
                Sampling(max_new_tokens=8), validation=Sampling(max_new_tokens=8, samples_per_prompt=3)
            ),
            Parity(silent),
        ],
        max_steps=4,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    seed_everything(5, verbose=False)
    module.configure_model()  # before the fork, so that this process has the weights to receive the result
    trainer.fit(module, data)
    return module.state_dict(), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("silent", [0, 2], ids=["all judged", "one rank without verdicts"])
def test_two_processes_do_what_one_does(silent: int) -> None:
    # with `silent` = 2 only even rows have a verdict, and interleaved ranks give all odd rows to the second
    one, metrics = run(1, silent)
    two, same = run(2, silent)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0.0, msg=lambda m, n=name: f"{n}: {m}")
    compared = [n for n in metrics if n.split("/")[0] in ("policy", "critic", "reward", "advantage", "val")]
    assert {"policy/loss", "critic/loss", "policy/grad_norm", "val/few/avg@3"} <= set(compared)
    for name in compared:
        assert same[name] == pytest.approx(metrics[name], abs=2e-6), name
