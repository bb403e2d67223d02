"""Models whose weights are spread over two processes (FSDP2) do what they do on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import CLOSE, article, check_same, grpo, ppo, run
from forked import on_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import make_chain_sppo, make_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sppo_lightning.callbacks import (
    AdaptiveSamples,
    HFExport,
    MemoryPlan,
    ReferenceRefresh,
    SamplerParity,
    WarmStartGate,
)
from sppo_lightning.data import SolvabilityCurriculum
from sppo_lightning.errors import InputError
from sppo_lightning.models import LoRA
from sppo_lightning.pooling import PooledAdvantage


def fsdp(group: int = 1, **settings: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(tensor_parallel_size=group, **settings)


class Held(Callback):
    """Keeps, of each model, how many of its numbers this rank holds, and how many there are."""

    def __init__(self) -> None:
        self.numbers: dict[str, tuple[int, int]] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("policy", "critic", "reference"):
            weights = [p for n, p in pl_module.named_parameters() if n.startswith(name)]
            assert all(isinstance(weight, DTensor) for weight in weights)
            parts = [weight.to_local() for weight in weights if isinstance(weight, DTensor)]
            self.numbers[name] = (sum(map(torch.numel, parts)), sum(map(torch.numel, weights)))


def sharded(silent: int = 0, *callbacks: Callback, **settings: Any) -> Any:
    held = Held()
    weights, metrics = run(2, silent, None, 6, held, *callbacks, strategy=fsdp(), **settings)
    return weights, metrics, held.numbers


def curriculum() -> dict[str, Any]:
    """A critic that is asked about all prompts after each iteration."""
    return {"curriculum": SolvabilityCurriculum(rescore_every_n_iterations=1)}


def lora() -> dict[str, Any]:
    return {"lora": LoRA(rank=2), "kl_coef": 0.1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "silent", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["all judged", "one rank without verdicts"]
)
def test_sppo_on_two_processes_does_what_it_does_on_one(tmp_path: Path, silent: int) -> None:
    gate = WarmStartGate(0.01, prompts=7)
    both = on_ranks(2, tmp_path, sharded, silent, MemoryPlan(), gate, kl_coef=0.1)
    one = run(1, silent, None, 6, gate, kl_coef=0.1)
    assert one[1]["warm_start/pass_rate"] == both[0][1]["warm_start/pass_rate"] > 0
    for weights, metrics, numbers in both:
        check_same(one, (weights, metrics))
        for held, there in numbers.values():
            assert 0.45 * there < held < 0.55 * there  # of every weight a half


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [grpo, ppo, article, lora, curriculum])
def test_every_family_does_on_two_processes_what_it_does_on_one(
    tmp_path: Path, family: Callable[[], dict[str, Any]]
) -> None:
    both = on_ranks(2, tmp_path, sharded, **family())
    one = run(1, **family())
    for weights, metrics, _ in both:
        check_same(one, (weights, metrics))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_extra_responses_are_the_same(tmp_path: Path) -> None:
    stage, settings = AdaptiveSamples(100, 4), {"advantage": PooledAdvantage()}
    both, one = on_ranks(2, tmp_path, sharded, 0, stage, **settings), run(1, 0, None, 6, stage, **settings)
    assert one[1]["adaptive/extra_samples"] > 0
    for weights, metrics, _ in both:
        check_same(one, (weights, metrics))
        assert metrics["adaptive/tokens"] == one[1]["adaptive/tokens"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_sampled_ahead_is_the_same(tmp_path: Path) -> None:
    both, one = on_ranks(2, tmp_path, sharded, prefetch=1), run(1, prefetch=1)
    for weights, metrics, _ in both:
        check_same(one, (weights, metrics))


def cut_and_resumed(
    folder: Path, ranks: int = 2, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of an undisturbed run, and of one that goes on from a checkpoint of the second iteration."""
    refresh = ReferenceRefresh(every_n_updates=3, mix=0.5)
    whole_run, _ = run(ranks, 0, None, 6, refresh, strategy=fsdp(**settings), kl_coef=0.1)
    run(ranks, 0, folder, 4, ReferenceRefresh(3, 0.5), strategy=fsdp(**settings), kl_coef=0.1)
    name = str(folder / f"{ranks}.ckpt")
    again = ReferenceRefresh(3, 0.5)
    resumed, _ = run(ranks, 0, None, 6, again, strategy=fsdp(**settings), kl_coef=0.1, ckpt_path=name)
    return whole_run, resumed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save_distributed_checkpoint", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, save_distributed_checkpoint: bool) -> None:
    saved = {"save_distributed_checkpoint": save_distributed_checkpoint}
    for undisturbed, resumed in on_ranks(2, tmp_path, cut_and_resumed, tmp_path, **saved):
        assert {name.split(".")[0] for name in undisturbed} == {"policy", "critic", "reference"}
        assert [name for name, value in undisturbed.items() if not torch.equal(value, resumed[name])] == []
    assert (tmp_path / "2.ckpt").is_dir() == save_distributed_checkpoint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "adapted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all weights", "lora"]
)
@pytest.mark.parametrize("group", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_whole_model_leaves_the_run(tmp_path: Path, adapted: bool, group: int) -> None:
    settings: dict[str, Any] = {"lora": LoRA(rank=2)} if adapted else {}
    weights, _ = on_ranks(2, tmp_path, exported, tmp_path / "model", group, **settings)[0]
    run(1, 0, None, 6, HFExport(str(tmp_path / "one")), **settings)
    for auto_class, part in ((AutoModelForCausalLM, "."), (AutoModelForSequenceClassification, "critic")):
        found = auto_class.from_pretrained(tmp_path / "model" / part).state_dict()
        for name, weight in auto_class.from_pretrained(tmp_path / "one" / part).state_dict().items():
            torch.testing.assert_close(found[name], weight, **CLOSE)
    if not adapted:
        for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict().items():
            assert torch.equal(weight, weights[f"policy.model.{name}"])


def exported(path: Path, group: int = 1, **settings: Any) -> Any:
    return run(2, 0, None, 6, HFExport(str(path)), strategy=fsdp(group), **settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bf16_is_sampled_from_as_it_is_trained(tmp_path: Path) -> None:
    for weights, metrics in on_ranks(2, tmp_path, in_bf16):
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert 0 < metrics["sampler/logprob_gap"] < 2e-3  # the copy's weights are rounded as autocast rounds them


def in_bf16() -> Any:
    precision = {"precision": "bf16-mixed"}
    return run(2, 0, None, 6, SamplerParity(), strategy=fsdp(), trainer_settings=precision)


def settled(data: Any, tensor: Any) -> tuple[int, int]:
    """The sizes that a run on four devices has."""
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    module = make_chain_sppo(1e-3)
    module.trainer = make_trainer(devices=4, strategy=strategy)
    module.configure_callbacks()
    return strategy._data_parallel_size, strategy._tensor_parallel_size


@pytest.mark.parametrize(("data", "tensor"), [(2, 4), ("auto", 3), ("auto", 8), (2, "auto"), (3, 1)])
def test_sizes_that_make_another_number_of_ranks_are_refused(data: Any, tensor: Any) -> None:
    with pytest.raises(InputError, match=r"over 4 ranks cannot have .* that divides 4, and leave the other out\."):
        settled(data, tensor)


@pytest.mark.parametrize(
    ("data", "tensor", "expected"), [("auto", 1, (4, 1)), ("auto", 2, (2, 2)), (1, "auto", (1, 4))]
)
def test_sizes_that_are_left_out_follow(data: Any, tensor: Any, expected: tuple[int, int]) -> None:
    assert settled(data, tensor) == expected
