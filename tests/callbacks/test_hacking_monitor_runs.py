import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import ByRow, FirstWord, data, sft, sppo, stages, weights
from tiny_run import trainer_of as real_trainer_of
from toy_pipeline import Scored, Toy, loader, trainer_of
from watched import (
    SAYS,
    Breaks,
    Lengths,
    Metrics,
    alarms_of,
    examples_in,
    graded,
    grader,
    monitor_of,
    reward_of,
    watch,
)

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import HackingMonitor, Verifier
from sppo_lightning.verification.drift import Limits

LATE = [[f"1|1|{SAYS}{i}" for i in range(2)]] * 2 + [[f"1|0|{SAYS}{i}" for i in range(2)]] * 4


@pytest.mark.parametrize("saves", [False, True], ids=["alone", "beside other checkpoints"])
def test_an_alarm_stops_the_run_with_a_checkpoint_to_go_on_from(
    tmp_path: Path, saves: bool, recwarn: pytest.WarningsRecorder
):
    more = [ModelCheckpoint(tmp_path / "saved", "{step}")] if saves else []
    monitor = monitor_of(tmp_path / "here", grader(), stop_on_alarm=True)
    metrics, trainer = watch(monitor, LATE, more=more, enable_checkpointing=saves)
    assert (len(metrics.iterations), trainer.global_step) == (4, 4)
    file = tmp_path / ("saved" if saves else "here") / "alarm-step=4.ckpt"
    assert [str(w.message) for w in recwarn if "stops the run" in str(w.message)] == [
        f"HackingMonitor stops the run; after a look at the examples, go on with `--ckpt_path {file}`, where an alarm "
        "that was raised is not raised again."
    ]
    again = monitor_of(tmp_path / "again", grader(), stop_on_alarm=True)
    module = Toy()
    metrics, trainer = watch(again, LATE, module=module, ckpt_path=str(file))
    assert (len(metrics.iterations), trainer.global_step) == (2, 6)
    assert module.weight.item() == pytest.approx(-0.6)
    assert alarms_of(recwarn) == ["hacking/grader/gap"]


def test_an_alarm_of_a_validation_stops_the_run_too(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    batches = [graded("1", "0")] * 3 + [graded("1", "1")] * 5
    settings: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    held_out = [graded("0", "0")]
    metrics, _ = watch(monitor_of(tmp_path, stop_on_alarm=True), batches, held_out, **settings)
    assert len(metrics.iterations) == 6
    again = monitor_of(tmp_path, stop_on_alarm=True)
    file = str(tmp_path / "alarm-step=6.ckpt")
    rest = [*batches[6:], *batches[:6]]
    metrics, trainer = watch(again, rest, held_out, ckpt_path=file, **settings)
    assert trainer.global_step == 8
    unbroken = monitor_of(tmp_path)
    watch(unbroken, batches, held_out, **settings)
    assert again.state_dict() == unbroken.state_dict()
    assert again.series["paid/train_minus_held_out"].entries == [(1.0, 1, 0.0), (1.0, 1, 0.0)]


def test_without_it_the_run_goes_on(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    metrics, _ = watch(monitor_of(tmp_path, grader()), LATE)
    assert len(metrics.iterations) == 6
    assert alarms_of(recwarn) == ["hacking/grader/gap"]


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_resumed_series_is_the_unbroken_one(tmp_path: Path, cut: int, recwarn: pytest.WarningsRecorder):
    settings: dict[str, Any] = {"check_every_n_iterations": 2, "window": 4, "limits": Limits(length_share=0.9)}
    batches = [[f"1|{1 - i // 4}|{SAYS * (8 - i)}{i}", f"1|{1 - i // 4}|{i}"] for i in range(8)]

    def run(folder: str, batches: list[list[str]], **more: Any) -> tuple[Metrics, HackingMonitor, list[str]]:
        recwarn.clear()
        monitor = monitor_of(tmp_path / folder, grader(), **settings)
        saved = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        metrics, _ = watch(monitor, batches, more=[saved], enable_checkpointing=True, **more)
        return metrics, monitor, alarms_of(recwarn)

    whole, unbroken, told = run("whole", batches)
    # a loader without a state starts over, and the run ends after what was left of its epoch
    rest = [*batches[cut:], *batches[:cut]]
    resumed, monitor, told_after = run("resumed", rest, ckpt_path=str(tmp_path / "whole" / f"step={cut}.ckpt"))
    for row, expected in zip(resumed.iterations, whole.iterations[cut:], strict=True):
        assert {name: expected[name] for name in row} == row
    assert monitor.state_dict() == unbroken.state_dict()
    assert told == ["hacking/response_tokens", "hacking/grader/gap"]  # in iterations 5 and 7
    assert told_after == [figure for figure, last in zip(told, (5, 7), strict=True) if cut < last]
    assert examples_in(tmp_path / "resumed") == examples_in(tmp_path / "whole")


# ---------------------------------------------------------------------- in a real run


class Noisy(Verifier):
    """A check that draws random numbers, differentiates and is not sure."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        weight = torch.rand(1, requires_grad=True)
        assert not (2 * weight).requires_grad
        return [float(score) for score in torch.rand(len(responses))]


def test_watching_changes_no_weight_and_no_reward(tmp_path: Path):
    found = []
    for watching in (True, False):
        module, metrics = sppo(tmp_path), Rewards()
        monitor = [monitor_of(tmp_path, FirstWord(name="again"), Noisy())] if watching else []
        trainer = real_trainer_of([*stages(), metrics, *monitor], val_check_interval=2)
        trainer.fit(module, datamodule=data())
        found.append((weights(module), metrics.seen))
        if watching:
            assert metrics.phases[0]["monitor"] > 0
            assert trainer.callback_metrics["time/monitor"] > 0
            assert trainer.callback_metrics["hacking/again/gap"] == 0
            assert "hacking/first_word/train_minus_held_out" in trainer.callback_metrics
    (one, seen), (other, same) = found
    assert torch.equal(one, other)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for pair in zip(seen, same, strict=True) for a, b in zip(*pair, strict=True))
    assert {len(row) for row in seen} == {3}


class RightAtFirst(Verifier):
    """Scores 1 the first two times that it is asked, and 0 from then on."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        self.times = getattr(self, "times", 0) + 1
        return [float(self.times <= 2)] * len(responses)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_an_alarm_stopped_goes_on_to_the_same_bits(tmp_path: Path):
    def run(stop: bool, **settings: Any) -> tuple[torch.Tensor, int]:
        module = sppo(tmp_path)
        monitor = monitor_of(tmp_path, RightAtFirst(), window=1, stop_on_alarm=stop)
        trainer = real_trainer_of([*stages(ByRow(lambda row: float(row % 3 > 0))), monitor], max_epochs=2)
        trainer.fit(module, data(()), weights_only=False, **settings)
        return weights(module), trainer.global_step

    whole, steps = run(False)
    cut, stopped_at = run(True)
    resumed, steps_after = run(True, ckpt_path=str(tmp_path / "alarm-step=6.ckpt"))
    assert (steps, stopped_at, steps_after) == (16, 6, 16)  # of two updates an iteration
    assert not torch.equal(cut, whole)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("logs", [True, False])
def test_examples_are_in_the_runs_folder(tmp_path: Path, logs: bool):
    logger = TensorBoardLogger(tmp_path / "logs") if logs else False
    trainer = real_trainer_of(
        [*stages(ByRow(lambda row: 1.0)), HackingMonitor(examples=3)], logger=logger, default_root_dir=tmp_path
    )
    trainer.fit(sppo(tmp_path), data(()))
    folder = Path(logger.log_dir) if logger else tmp_path
    found = examples_in(folder)
    assert len(found) == 3
    assert {each["iteration"] for each in found} == {1}  # the only one of four that was due
    if logger:
        accumulator = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
        (event,) = accumulator.Tensors("hacking/examples/text_summary")
        table = event.tensor_proto.string_val[0].decode()
        assert event.step == 0
        assert table.splitlines()[0] == "| iteration | reward | reasons | prompt | response | gold |"
        assert table.splitlines()[2] == (
            f"| 1 | 1.00 | {found[0]['reasons'][0]} | {found[0]['prompt']} | {found[0]['response']} | a |"
        )


class Rewards(Metrics):
    """Rewards, scores and random state of each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[torch.Tensor]] = []
        self.phases: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        scores = [scores.values for scores in batch.rollouts.scores.values()]
        self.seen.append([batch.rollouts.rewards, torch.get_rng_state(), *scores])
        self.phases.append(dict(pl_module.last_phase_seconds))


def test_supervised_learning_is_left_in_peace(tmp_path: Path):
    trainer = real_trainer_of([*stages(), monitor_of(tmp_path, FirstWord(name="again"))])
    trainer.fit(sft(), datamodule=data())
    assert "hacking/again/held_out_gap" in trainer.callback_metrics
    assert "hacking/response_tokens" not in trainer.callback_metrics


# ---------------------------------------------------------------------- several ranks


class WritesWhatItShows(Toy):
    """Writes what its rank saw to a file, since a forked rank takes everything else with it."""

    def __init__(self, folder: Path, monitor: HackingMonitor) -> None:
        super().__init__()
        self.folder, self.monitor = folder, monitor

    def on_train_end(self) -> None:
        shown = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        found = [shown, self.monitor.state_dict(), self.trainer.global_step]
        (self.folder / f"{self.trainer.world_size}-{self.global_rank}.json").write_text(json.dumps(found))


class Shares(LightningDataModule):
    """Gives each rank its own batches: those of one iteration by rank, or all of them together to a single rank."""

    def __init__(self, shares: Sequence[Sequence[list[str]]], held_out: Sequence[list[str]]) -> None:
        super().__init__()
        self.shares, self.held_out = shares, held_out

    def own(self, parts: Sequence[list[str]]) -> list[str]:
        trainer: Any = self.trainer
        return sum(parts, []) if trainer.world_size == 1 else parts[trainer.global_rank]

    def train_dataloader(self) -> Any:
        return loader(*map(self.own, self.shares))

    def val_dataloader(self) -> Any:
        return loader(self.own(self.held_out))


def over(ranks: int, folder: Path, data: Shares) -> list[Any]:
    """What each rank saw of a run with a validation after each iteration."""
    monitor = monitor_of(folder, grader(), Breaks(max_failure_rate=0.5), stop_on_alarm=True)
    settings: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    if ranks > 1:
        # ranks that wait for each other in different places fail after the timeout
        settings |= {"strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=30)), "devices": ranks}
    stages = [Lengths(), Scored(reward_of, name="paid"), monitor]
    trainer = trainer_of(*stages, use_distributed_sampler=False, **settings)
    trainer.fit(WritesWhatItShows(folder, monitor), data)
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.filterwarnings("ignore")
def test_two_processes_see_and_stop_as_one_does(tmp_path: Path):
    # the first rank's share of the second iteration is empty, and the second rank alone has what a check fails on
    shares = [
        ([f"1|1|{SAYS}{i}" for i in range(3)], [f"1|0|{SAYS}x"]),
        ([], [rf"1|1|{SAYS}", "?|0|", "0|1|answer: 3 or 4"]),
        *[([f"1|0|{SAYS}{i}"], [f"1|0|{SAYS}{i}!", f"1|0|{SAYS}"]) for i in range(4)],
    ]
    data = Shares(shares, [graded("1", "0"), graded("0")])
    (one,), (two, same) = over(1, tmp_path, data), over(2, tmp_path, data)
    assert two == same
    metrics, state, step = one
    assert {
        "hacking/grader/gap",
        "hacking/paid/train_minus_held_out",
        "hacking/distinct_responses",
    } <= metrics.keys()
    compared = {name: value for name, value in metrics.items() if name.startswith("hacking/")}
    assert {name: two[0][name] for name in compared} == pytest.approx(compared)
    assert step == two[2] == 4
    assert state["fired"] == two[1]["fired"] == ["grader/gap", "breaks/gap"]
    assert state["failed"] == two[1]["failed"] == ["breaks"]
    assert sorted(e["response"] for e in state["worst"]) == sorted(e["response"] for e in two[1]["worst"])
    assert (tmp_path / "alarm-step=4.ckpt").exists()
