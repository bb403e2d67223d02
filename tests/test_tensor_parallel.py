"""Models whose layers are cut over ranks (tensor parallelism) do what they do whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import CLOSE, article, check_same, grpo, ppo, run
from forked import on_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from sppo_lightning.callbacks import MemoryPlan

GROUP = 2


def tensor_parallel(**settings: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(tensor_parallel_size=GROUP, **settings)


def cut(ranks: int, *callbacks: Callback, **settings: Any) -> Any:
    return run(ranks, 0, None, 6, *callbacks, strategy=tensor_parallel(), **settings)


def sppo() -> dict[str, Any]:
    return {"kl_coef": 0.1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [sppo, grpo])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_does_what_it_does_on_one_process(
    tmp_path: Path, ranks: int, family: Callable[[], dict[str, Any]]
) -> None:
    all_of_them = on_ranks(ranks, tmp_path, cut, ranks, **family())
    one = run(1, **family())
    for weights, metrics in all_of_them:
        check_same(one, (weights, metrics))
