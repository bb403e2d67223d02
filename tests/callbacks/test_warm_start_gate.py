"""WarmStartGate: figures by hand, a refusal in one sentence, no trace where it lets a run through."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import WritesDown
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_run import ByRow, FirstWord, data, sft, sppo, stages, trainer_of, weights
from torch.multiprocessing import ProcessRaisedException

from sppo_lightning.batch import Rollouts
from sppo_lightning.callbacks import RolloutGeneration, Verifier, WarmStartGate
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError

ALL = 32  # training prompts of `data`


class Quarter(ByRow):
    """Every fourth row is solved; keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__(lambda row: float(row % 4 == 0))
        self.seen: list[tuple[int, str]] = []

    def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
        rows = [prompt.row for prompt in rollouts.prompts]
        self.seen += list(zip(rows, rollouts.finish_reasons, strict=True))
        return super().score_rollouts(rollouts)


def fit(
    folder: Path, *callbacks: Callback, judge: Verifier | None = None, prefetch: int = 0, **settings: Any
) -> Any:
    module = sppo(folder)
    rollout = RolloutGeneration(Sampling(max_new_tokens=2), prefetch=prefetch)
    trainer = trainer_of([rollout, judge or Quarter(), *callbacks], limit_val_batches=0, **settings)
    trainer.fit(module, datamodule=data())
    return module, trainer


def test_it_refuses_with_figures_and_ways_out(tmp_path: Path) -> None:
    judge = Quarter()
    with pytest.raises(InputError) as refusal:
        fit(tmp_path, WarmStartGate(0.3, prompts=100, samples_per_prompt=2), judge=judge)
    reasons = [reason for _, reason in judge.seen]
    assert len(reasons) == 64
    truncated = reasons.count("length") / 64
    assert truncated > 0.5  # of 8 words and the end of the sequence, two at random
    # Wilson's interval for 8 of 32: (0.25 + 3.8416 / 64 ± 1.96 · √(0.1875 / 32 + 3.8416 / 4096)) / (1 + 3.8416 / 32)
    assert str(refusal.value) == (
        "The policy starts with a pass rate of 25.0% (95 % interval 13.3% to 42.1%; 64 responses to 32 training "
        f"prompts, {truncated:.1%} of them cut off), below `WarmStartGate.min_pass_rate`=0.3, so that reinforcement "
        "would spend its hours on zeros; raise `sampling.max_new_tokens`=2, at which most responses are cut off, "
        "warm-start it longer and point `model.policy.pretrained` to the result, give easier prompts, try more "
        "responses (`prompts` or `samples_per_prompt`), for the true rate may be above it, or lower the floor."
    )


def test_more_responses_are_no_way_out_where_the_interval_lies_below_the_floor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"below `WarmStartGate.min_pass_rate`=0\.5") as refusal:
        fit(tmp_path, WarmStartGate(0.5, prompts=ALL))
    assert "try more" not in str(refusal.value)


def test_responses_without_a_verdict_are_left_out_and_told(tmp_path: Path) -> None:
    judge = ByRow(lambda row: None if row % 2 else float(row % 4 == 0))  # 8 of 16
    _, trainer = fit(tmp_path, WarmStartGate(0.5, prompts=ALL), judge=judge)
    assert float(trainer.callback_metrics["warm_start/pass_rate"]) == 0.5
    with pytest.raises(InputError, match="pass rate of 50.0% .*, 16 without a verdict"):
        fit(tmp_path, WarmStartGate(0.51, prompts=ALL), judge=judge)
    with pytest.raises(InputError, match="pass rate of 0.0% .*, 32 without a verdict"):
        fit(tmp_path, WarmStartGate(0.01, prompts=ALL), judge=ByRow(lambda row: None))


def test_few_prompts_are_drawn_at_random_the_same_in_every_run(tmp_path: Path) -> None:
    def tried() -> list[int]:
        judge = Quarter()
        with pytest.raises(InputError):
            fit(tmp_path, WarmStartGate(1.0, prompts=12), judge=judge)
        return [row for row, _ in judge.seen]

    rows = tried()
    assert len(set(rows)) == 12
    assert rows == tried() != sorted(rows)


def logged(trainer: Trainer) -> dict[str, float]:
    clock = re.compile("time/|memory/|.*second")
    return {
        k: float(v) for k, v in trainer.callback_metrics.items() if not clock.match(k) and "warm_start" not in k
    }


@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_passes_is_the_one_without_the_gate(tmp_path: Path, prefetch: int) -> None:
    class Draws(Quarter):
        """Moves the random numbers, as a verifier may."""

        def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
            self.drawn = torch.rand(3)
            return super().score_rollouts(rollouts)

    runs = []
    for gates in ([WarmStartGate(0.25, prompts=ALL)], []):
        judge, shaping = Draws(), FirstWord(weight=0.1, role="shaping")
        module, trainer = fit(tmp_path, shaping, *gates, judge=judge, prefetch=prefetch)
        assert trainer.global_step == 8
        seen = judge.seen[ALL * len(gates) :]
        runs.append(
            (weights(module), judge.drawn, torch.get_rng_state(), (seen, shaping.state_dict(), logged(trainer)))
        )
    (*tensors, plain), (*others, other) = runs
    assert all(map(torch.equal, tensors, others))
    assert plain[:2] == other[:2]
    assert plain[2] == pytest.approx(other[2], abs=0, nan_ok=True)


def test_the_figures_are_logged_at_step_0(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, WarmStartGate(0.25, prompts=ALL), logger=logger, max_steps=2)
    header, first, *_ = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["step"], float(row["warm_start/pass_rate"])) == ("0", 0.25)
    assert 0 < float(row["warm_start/truncated_fraction"]) <= 1


def test_a_resumed_run_goes_straight_on(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_last=True)
    fit(tmp_path, WarmStartGate(0.25), saver, enable_checkpointing=True, max_steps=4)
    judge = Quarter()
    trainer = trainer_of([*stages(judge), WarmStartGate(1.0)], limit_val_batches=0, max_steps=6)
    trainer.fit(sppo(tmp_path), datamodule=data(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert (trainer.global_step, len(judge.seen)) == (6, 8)


class WrittenDown(WritesDown, WarmStartGate):
    """What each rank raises."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0.3, prompts=31)
        self.folder = folder


def test_all_ranks_refuse_with_the_figures_of_one(tmp_path: Path) -> None:
    with pytest.raises(InputError) as alone:
        fit(tmp_path, WarmStartGate(0.3, prompts=31))
    with pytest.raises(ProcessRaisedException):
        fit(tmp_path, WrittenDown(tmp_path), devices=2, strategy="ddp_fork")
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == str(alone.value)


def test_where_it_does_not_belong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`model` is SFTModule; remove WarmStartGate"):
        trainer_of([WarmStartGate()]).fit(sft(), datamodule=data())
    with pytest.raises(InputError, match="as RolloutGeneration does, without it; list it too"):
        trainer_of([WarmStartGate()]).fit(sppo(tmp_path), datamodule=data())
    with pytest.raises(InputError, match="`WarmStartGate.min_pass_rate`=0 keeps nothing back"):
        WarmStartGate(0)
    with pytest.raises(InputError, match="`WarmStartGate.prompts`=0 tries nothing; use 1 or more"):
        WarmStartGate(prompts=0)
