"""One process or several: the same losses, weights and validation metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import CLOSE, article, check_same, grpo, ppo, rloo, run
from lightning.pytorch import seed_everything
from tiny import make_chain_policy, make_trainer

from sppo_lightning import SFTModule
from sppo_lightning.data import ChainTask, PromptDataModule, PromptSource
from sppo_lightning.replay import CriticReplay
from sppo_lightning.shrinkage import ShrunkSequenceAdvantage


class Given(PromptSource):
    """The rows that it is given."""

    origin = "Given"

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        self.given = given

    def rows(self) -> Sequence[Mapping[str, Any]]:
        return self.given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ranks", "silent"), [(2, 0), (2, 2), (4, 0)], ids=["two", "two, one without verdicts", "four"]
)
def test_many_processes_do_what_one_does(ranks: int, silent: int) -> None:
    # with `silent` = 2 only even rows have a verdict, and interleaved ranks give all odd rows to the second
    check_same(run(1, silent), run(ranks, silent))


@pytest.mark.filterwarnings("ignore")
def test_three_processes_of_which_one_never_has_a_prompt_to_validate() -> None:
    settings: dict[str, Any] = {"batch_size": 12, "mini_batch_size": 6}
    check_same(run(1, **settings), run(3, **settings))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [grpo, rloo, ppo, article])
def test_every_family_does_on_two_processes_what_it_does_on_one(family: Callable[[], dict[str, Any]]) -> None:
    check_same(run(1, **family()), run(2, **family()))


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
