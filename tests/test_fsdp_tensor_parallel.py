"""Runs whose models are cut over pairs of ranks, and spread over those pairs, do what they do on one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import article, check_same, grpo, ppo, run
from forked import on_ranks
from lightning.pytorch import Callback
from test_fsdp import cut_and_resumed, fsdp, lora

from sppo_lightning.callbacks import MemoryPlan, SamplerParity

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def sppo() -> dict[str, Any]:
    return {"kl_coef": 0.1, "silent": 2}  # so that ranks have other numbers of rows to learn from


def cut(ranks: int, *callbacks: Callback, silent: int = 0, **settings: Any) -> Any:
    return run(ranks, silent, None, 6, *callbacks, strategy=fsdp(2), **settings)


@pytest.mark.parametrize("family", [sppo, grpo, ppo, article, lora])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_does_what_it_does_on_one_process(
    tmp_path: Path, ranks: int, family: Callable[[], dict[str, Any]]
) -> None:
    all_of_them = on_ranks(ranks, tmp_path, cut, ranks, MemoryPlan(), SamplerParity(), **family())
    one = run(1, **family())
    for weights, metrics in all_of_them:
        check_same(one, (weights, metrics))
        assert metrics["sampler/parity_gap_max"] < 1e-5


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, ranks: int, in_parts: bool) -> None:
    saved = {"save_distributed_checkpoint": in_parts}
    for undisturbed, resumed in on_ranks(ranks, tmp_path, cut_and_resumed, tmp_path, ranks, group=2, **saved):
        assert [name for name, value in undisturbed.items() if not torch.equal(value, resumed[name])] == []
    assert (tmp_path / f"{ranks}.ckpt").is_dir() == in_parts
