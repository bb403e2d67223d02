"""Whole runs that replay successes: on many ranks what they are on one, and resumed what they are undisturbed."""

from pathlib import Path
from typing import Any

import chain_run
import pytest
import torch
from forked import on_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from sppo_lightning.callbacks import SuccessReplay


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("silent", "rows"), [(0, 3), (2, 1)], ids=["uneven shares", "one rank has none"])
def test_two_processes_do_what_one_does(silent: int, rows: int):
    one, two = (
        chain_run.run(devices, silent, None, 8, SuccessReplay(below=1.0, rows=rows, coef=1.0)) for devices in (1, 2)
    )
    plain = chain_run.run(1, silent, None, 8)
    chain_run.check_same(one, two)
    names = [name for name in one[1] if name.startswith("replay/")]
    assert {"replay/rows", "replay/stored", "replay/loss", "replay/weight_mean", "replay/retired"} <= set(names)
    assert one[1]["replay/rows"] == rows
    assert {name: two[1][name] for name in names} == pytest.approx({name: one[1][name] for name in names}, rel=1e-5)
    assert any((one[0][name] - plain[0][name]).abs().max() > 1e-4 for name in plain[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", [1, 2], ids=["sharded", "cut over both"])
@pytest.mark.parametrize("rows", [3, 1])
def test_models_spread_over_two_processes_do_what_whole_ones_do(tmp_path: Path, group: int, rows: int):
    strategy = ModelParallelStrategy(tensor_parallel_size=group)
    stage = SuccessReplay(below=1.0, rows=rows, coef=1.0)
    both = on_ranks(2, tmp_path, chain_run.run, 2, 0, None, 8, stage, strategy=strategy)
    one = chain_run.run(1, 0, None, 8, SuccessReplay(below=1.0, rows=rows, coef=1.0))
    for found in both:
        chain_run.check_same(one, found)
        assert found[1]["replay/loss"] == pytest.approx(one[1]["replay/loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, prefetch: int):
    def run(steps: int, folder: Path | None = None, **settings: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        stage = SuccessReplay(below=1.0, rows=3, coef=1.0)
        return chain_run.run(settings.pop("devices", 1), 0, folder, steps, stage, prefetch=prefetch, **settings)

    whole = run(14)
    run(8, tmp_path)
    resumed = run(14, ckpt_path=str(tmp_path / "1.ckpt"))
    assert [name for name, weight in whole[0].items() if not torch.equal(weight, resumed[0][name])] == []
    replayed = {name: value for name, value in whole[1].items() if name.startswith("replay/")}
    assert replayed.items() <= resumed[1].items()
    assert (replayed["replay/rows"], replayed["replay/stored"] > 3) == (3, True)
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)  # plain types
    del checkpoint["callbacks"]["SuccessReplay"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    forgot = run(14, ckpt_path=str(tmp_path / "less.ckpt"))
    assert any(not torch.equal(weight, forgot[0][name]) for name, weight in whole[0].items())
    if not prefetch:
        chain_run.check_same(whole, run(14, ckpt_path=str(tmp_path / "1.ckpt"), devices=2))
