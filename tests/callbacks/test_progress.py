import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import Recorder, data, sft, sppo, stages, trainer_of

from sppo_lightning.callbacks.initial_validation import InitialValidation
from sppo_lightning.callbacks.progress import (
    Forecast,
    RichProgress,
    clock,
    forecast,
    numbers,
    thousands,
    validation_line,
)
from sppo_lightning.errors import InputError


@pytest.fixture(autouse=True)
def _same_console() -> Iterator[None]:
    yield
    rich.reconfigure()


@pytest.mark.parametrize(
    ("limit", "seconds_left", "expected"),
    [
        (50, None, Forecast(50, 80.0)),  # 40 iterations of 2 s
        (50, 1000.0, Forecast(50, 80.0)),
        (50, 31.0, Forecast(26, 31.0, by_time=True)),  # 31 s are 15.5 iterations, the last one is finished
        (math.inf, 31.0, Forecast(26, 31.0, by_time=True)),
        (math.inf, -1.0, Forecast(10, 0.0, by_time=True)),
        (math.inf, None, Forecast(math.inf, None)),
    ],
)
def test_the_limit_that_comes_first_ends_the_run(
    limit: float, seconds_left: float | None, expected: Forecast
) -> None:
    found = forecast(10, seconds_per_iteration=2.0, limit=limit, seconds_left=seconds_left)
    assert found == expected


def test_before_the_first_iteration_only_the_limits_are_known() -> None:
    known = forecast(0, seconds_per_iteration=None, limit=50, seconds_left=60.0)
    assert known == Forecast(50, 60.0)
    assert [str(f) for f in (known, Forecast(26, 31.0, by_time=True), Forecast())] == ["50", "~26", "–"]


def test_numbers_are_short() -> None:
    metrics = {
        "policy/loss": torch.tensor(-0.0312),
        "reward/mean": torch.tensor(0.6249),
        "critic/value_mean": torch.tensor(0.5951),
        "rollout/tokens_per_second": torch.tensor(12345.6),
        "advantage/std": torch.tensor(0.4),
    }
    assert numbers(metrics, 0.551) == "reward 0.62  V 0.60  val 0.55  12.3k tok/s  loss -0.03"
    assert numbers({"sft/loss": 1.5}) == "loss 1.50"
    assert numbers({}) == ""
    assert [thousands(n) for n in (0, 834.4, 999.4, 999.6, 12_345, 999_960, 1_234_567)] == (
        ["0", "834", "999", "1.0k", "12.3k", "1.0M", "1.2M"]
    )
    assert [clock(s) for s in (0, 59.4, 59.6, 3599, 3723)] == ["0:00", "0:59", "1:00", "59:59", "1:02:03"]


def test_a_validation_takes_one_line() -> None:
    metrics = {
        "val/easy/avg@4": 0.75,
        "val/easy/greedy": 1.0,
        "val/hard/avg@4": 0.125,
        "val/hard/greedy": 0.0,
        "val/all/avg@4": 0.4375,
        "val/all/greedy": 0.5,
        "val/all/pass@4": 0.9,
        "val/all/critic_pearson": 0.5,
        "reward/mean": 0.3,
    }
    expected = "sampled (greedy): all 0.44 (0.50)  easy 0.75 (1.00)  hard 0.12 (0.00)  V's r 0.50"
    assert validation_line(metrics) == expected
    assert validation_line({"val/sums/avg@1": 0.5}) == "sampled: sums 0.50"
    assert validation_line({}) == "sampled: no response with a verdict"


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_log_file_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    bar = RichProgress(plain_every_n_iterations=3)
    chain = [*stages(), bar, InitialValidation(), recorder]
    trainer_of(chain, val_check_interval=3, max_epochs=2).fit(sppo(tmp_path), datamodule=data())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    said = lines_of(out, "iteration")
    assert [line.split()[1] for line in said] == ["1/8", "3/8", "6/8", "8/8"]
    assert said[-1].split()[2].endswith("<0:00")
    for line, index in zip(said, (0, 2, 5, 7), strict=True):
        logged = recorder.iterations[index]
        assert f"reward {logged['reward/mean']:.2f}  V {logged['critic/value_mean']:.2f}  val " in line
        assert f"loss {logged['policy/loss']:.2f}" in line
    validations = lines_of(out, "validation")
    assert [re.match(r"validation at iteration (\d+), sampled", line)[1] for line in validations] == ["0", "3", "6"]  # type: ignore[index]
    for line, metrics in zip(validations, recorder.validations, strict=True):
        assert f"all {metrics['val/all/avg@2']:.2f} ({metrics['val/all/greedy']:.2f})" in line
        assert f"hard {metrics['val/hard/avg@2']:.2f} ({metrics['val/hard/greedy']:.2f})" in line


def test_a_terminal_gets_one_bar_that_fits_100_columns(tmp_path: Path) -> None:
    screen = io.StringIO()
    bar = RichProgress(plain=False, refresh_rate=1000)
    bar._console_kwargs = {"file": screen, "force_terminal": True, "width": 100, "color_system": None}
    chain = [*stages(), bar, InitialValidation()]
    trainer_of(chain, val_check_interval=3, max_epochs=2).fit(sppo(tmp_path), datamodule=data())
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    assert max(map(len, drawn.splitlines())) <= 100
    bars = lines_of(drawn, "train")
    assert re.fullmatch(
        r"train    ━{10} 8/8 \d:\d\d<0:00 reward \d\.\d\d  V \d\.\d\d  val \d\.\d\d  [\d.]+k? tok/s  loss -?\d\.\d\d *",
        bars[-1],
    )
    assert lines_of(drawn, "validate")
    assert len(lines_of(drawn, "validation at iteration")) == 3


def ended(module, bar: RichProgress, **settings) -> tuple[Trainer, str]:
    """A run's trainer, and the count that its bar ends with."""
    trainer = trainer_of([*stages(), bar], **({"val_check_interval": 100, "limit_val_batches": 0} | settings))
    trainer.fit(module, datamodule=data())
    return trainer, bar._count()


def test_max_steps_counts_updates_and_the_bar_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, count = ended(sppo(tmp_path), RichProgress(1), max_epochs=-1, max_steps=10)
    assert (trainer.global_step, count) == (10, "5/5")  # two updates per iteration
    assert [line.split()[1] for line in lines_of(capsys.readouterr().out, "iteration")] == [
        f"{i}/5" for i in range(1, 6)
    ]


def test_max_time_gives_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(sppo(tmp_path), RichProgress(1), max_epochs=-1, max_time={"seconds": 1})
    first, *_, last = [line.split() for line in lines_of(capsys.readouterr().out, "iteration")]
    assert re.fullmatch(r"1/~\d+", first[1])
    assert first[2] in ("0:00<0:01", "0:01<0:01", "0:00<0:00")
    done, total = last[1].split("/~")
    assert done == total
    assert last[2].endswith("<0:00")


def test_a_resumed_run_counts_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    chain = [*stages(), RichProgress(1), saver]
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}
    trainer_of(chain, max_steps=3, max_epochs=2, **settings).fit(sft(), datamodule=data())
    capsys.readouterr()
    trainer = trainer_of([*stages(), RichProgress(100)], max_epochs=2, **settings)
    trainer.fit(sft(), datamodule=data(), ckpt_path=str(tmp_path / "last.ckpt"))
    said = lines_of(capsys.readouterr().out, "iteration")
    assert [line.split()[1] for line in said] == ["4/8", "8/8"]


def test_lines_that_never_come_are_refused() -> None:
    with pytest.raises(InputError, match=r"`RichProgress\.plain_every_n_iterations`=0 prints nothing"):
        RichProgress(plain_every_n_iterations=0)
