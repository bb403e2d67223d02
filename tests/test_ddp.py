"""One process or two: the same losses, weights and validation metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import CHAIN_WORDS, TinyTokenCritic, make_chain_policy, make_chain_sppo, make_trainer
from transformers import PreTrainedTokenizerBase

from sppo_lightning import SFTModule
from sppo_lightning.advantages import GAE, GroupAdvantage, LeaveOneOutAdvantage
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule, PromptSource
from sppo_lightning.engines import Sampling
from sppo_lightning.models.tiny import word_tokenizer
from sppo_lightning.objectives import SequenceClipObjective
from sppo_lightning.replay import CriticReplay
from sppo_lightning.shrinkage import ShrunkSequenceAdvantage

# Of weights. A key's bias has no gradient but rounding, which differs between CPUs, and AdamW divides it by its size:
# a step is 1e-3 there.
CLOSE = {"atol": 5e-6, "rtol": 0.0}


class Given(PromptSource):
    """The rows that it is given."""

    origin = "Given"

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        self.given = given

    def rows(self) -> Sequence[Mapping[str, Any]]:
        return self.given


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


def run(
    devices: int, silent: int = 0, folder: Path | None = None, max_steps: int = 4, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    seed_everything(5, verbose=False)
    samples = settings.pop("samples", 1)
    module = make_chain_sppo(1e-3, micro_batch_tokens=24, **settings)
    data = PromptDataModule(
        train=ChainTask({"1-3": 1.0}, size=24),
        validation={"few": ChainTask({"1-3": 1.0}, size=3, split="validation")},
        batch_size=8,
        validation_batch_size=2,
        shuffle=False,
    )
    strategy: dict[str, Any] = {"strategy": "ddp_fork"} if devices > 1 else {}
    saved = [] if folder is None else [ModelCheckpoint(folder, f"{devices}", every_n_train_steps=max_steps)]
    trainer = make_trainer(
        RolloutGeneration(
            Sampling(max_new_tokens=8, samples_per_prompt=samples),
            validation=Sampling(max_new_tokens=8, samples_per_prompt=3),
        ),
        Parity(silent),
        *saved,
        devices=devices,
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        enable_checkpointing=bool(saved),
        **strategy,
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
        torch.testing.assert_close(two[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    groups = ("policy", "critic", "reward", "advantage", "val")
    compared = [
        n
        for n in metrics
        if n.split("/")[0] in groups or n in ("rollout/response_tokens_mean", "rollout/truncated_fraction")
    ]
    assert {"policy/loss", "critic/loss", "policy/grad_norm", "val/few/avg@3"} <= set(compared)
    for name in compared:
        assert same[name] == pytest.approx(metrics[name], abs=2e-6), name


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [grpo, rloo, ppo, article])
def test_every_family_does_on_two_processes_what_it_does_on_one(family: Callable[[], dict[str, Any]]) -> None:
    (one, metrics), (two, same) = run(1, **family()), run(2, **family())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for name in metrics:
        if name.split("/")[0] in ("policy", "critic", "reward", "advantage"):
            assert same[name] == pytest.approx(metrics[name], abs=5e-6, nan_ok=True), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("silent", [0, 2], ids=["all judged", "one rank without verdicts"])
def test_two_processes_remember_what_one_does(tmp_path: Path, silent: int) -> None:
    found = {}
    for devices in (1, 2):
        advantage = ShrunkSequenceAdvantage()
        replay = CriticReplay(ratio=100.0, half_life_iterations=2.0)  # all that is stored is seen, so draws agree
        settings: dict[str, Any] = {"advantage": advantage, "critic_replay": replay}
        found[devices] = run(devices, silent, tmp_path, 8, **settings)  # the fourth iteration visits again
    (one, metrics), (two, same) = found[1], found[2]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for name in metrics:
        if name.split("/")[0] in ("policy", "critic", "advantage"):
            assert same[name] == pytest.approx(metrics[name], abs=5e-6, rel=1e-6), name
    assert 0 < metrics["critic/shrinkage_weight"] < 1
    assert metrics["critic/replay_age"] == 2.0  # of iterations 1, 2 and 3 in the fourth
    first, second = (torch.load(tmp_path / f"{devices}.ckpt", weights_only=True) for devices in (1, 2))
    records = [sorted(checkpoint["advantage"]["records"]) for checkpoint in (first, second)]
    assert len(records[0]) == (12 if silent else 24)
    assert [r[:2] for r in records[0]] == [r[:2] for r in records[1]]
    assert [r[2:] for r in records[0]] == [pytest.approx(r[2:]) for r in records[1]]
    rows = [[prompt["row"] % 2 for prompt, *_ in part] for part in second["critic_replay"]["stored"]]
    assert rows == [[0] * 16, [] if silent else [1] * 16]


class RecordingSFT(SFTModule):
    """Keeps for each rank how many backward passes an update took, how many its rows alone need, and gradients."""

    def __init__(self, folder: Path) -> None:
        super().__init__(make_chain_policy(), micro_batch_tokens=40)
        self.folder = folder
        self.found: list[dict[str, Any]] = []

    def in_step(self, *groupings: Sequence[list[int]]) -> Iterator[Any]:
        self.found.append({"needed": len(groupings[0]), "backwards": []})
        return super().in_step(*groupings)

    def accumulate(self, loss: torch.Tensor, last: bool) -> None:
        self.found[-1]["backwards"].append(last)
        super().accumulate(loss, last)

    def step_optimizer(self, modules: Any, attempt: Any) -> Any:
        self.found[-1]["gradients"] = {name: p.grad.clone() for name, p in self.named_parameters()}
        torch.save(self.found, self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")
        return super().step_optimizer(modules, attempt)


def supervised(devices: int, folder: Path) -> tuple[list[list[dict[str, Any]]], float]:
    """What each rank recorded in two updates, and the last loss."""
    seed_everything(5, verbose=False)
    module = RecordingSFT(folder)
    module.configure_model()
    short, long = (ChainTask({length: 1.0}, 8, demonstrations=True).rows() for length in ("1", "4"))
    rows = [row for pair in zip(short, long, strict=True) for row in pair]  # ranks take turns
    data = PromptDataModule(train=Given(rows), batch_size=8, shuffle=False)
    settings: dict[str, Any] = {"strategy": "ddp_fork"} if devices > 1 else {}
    trainer = make_trainer(devices=devices, max_steps=2, log_every_n_steps=1, **settings)
    trainer.fit(module, data)
    ranks = [torch.load(folder / f"{devices}-{rank}.pt") for rank in range(devices)]
    return ranks, float(trainer.callback_metrics["sft/loss"])


@pytest.mark.filterwarnings("ignore")
def test_supervised_ranks_keep_in_step_and_learn_what_one_process_does(tmp_path: Path) -> None:
    [one], loss = supervised(1, tmp_path)
    ranks, same = supervised(2, tmp_path)
    for update, first, second in zip(one, *ranks, strict=True):
        assert first["needed"] < second["needed"]
        assert first["backwards"] == second["backwards"] == [False] * (second["needed"] - 1) + [True]
        for name, gradient in update["gradients"].items():
            torch.testing.assert_close(first["gradients"][name], gradient, atol=1e-6, rtol=1e-5)
            assert torch.equal(first["gradients"][name], second["gradients"][name])
    assert same == pytest.approx(loss, abs=1e-6)
