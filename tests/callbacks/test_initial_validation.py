from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_run import data, fit, rl_module, trainer_of

from sppo_lightning.callbacks import InitialValidation
from sppo_lightning.errors import InputError


class Watches(Callback):
    """Notes at which update validations ran, and the state that the first batch found."""

    def __init__(self) -> None:
        self.validated_at: list[int] = []
        self.first: dict[str, Any] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validated_at.append(trainer.global_step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.first:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.first = {"training": trainer.training and pl_module.training, "metrics": metrics}


def validated(folder: Path) -> dict[str, float]:
    """What `trainer.validate` says of the same weights."""
    lightning.seed_everything(1, verbose=False)
    return dict(trainer_of(folder).validate(rl_module(folder), data(), verbose=False)[0])


def test_validates_before_the_first_update_as_validate_does(tmp_path: Path) -> None:
    watches, logger = Watches(), CSVLogger(tmp_path, name="log", version=0)
    fit(tmp_path, InitialValidation(), watches, logger=logger, max_epochs=1)
    assert watches.validated_at == [0, 4, 8]  # 4 iterations of 2 updates, and every second one
    assert watches.first["training"] is True
    before = validated(tmp_path)
    assert {k: v for k, v in watches.first["metrics"].items() if k.startswith("val/")} == pytest.approx(
        {k: v for k, v in before.items() if k.startswith("val/")}, abs=1e-6
    )
    assert 0 < before["val/all/avg@2"] < 1
    text = (tmp_path / "log/version_0/metrics.csv").read_text().splitlines()
    columns = text[0].split(",")
    place, step = columns.index("val/all/avg@2"), columns.index("step")
    written = [(line.split(",")[step], line.split(",")[place]) for line in text[1:]]
    found = [(s, float(v)) for s, v in written if v]
    assert found[0] == ("0", pytest.approx(before["val/all/avg@2"], abs=1e-6))
    assert len(found) == 3


def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    with_it = fit(tmp_path, InitialValidation()).lightning_module.state_dict()
    without = fit(tmp_path).lightning_module.state_dict()
    assert all((with_it[name] == weight).all() for name, weight in without.items())


def test_a_resumed_run_goes_straight_on(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path, checkpoints, enable_checkpointing=True, limit_train_batches=4, max_steps=4)
    watches = Watches()
    fit(tmp_path, InitialValidation(min_pass_rate=1.0), watches, ckpt_path=tmp_path / "step=4.ckpt")
    assert watches.validated_at == [8]


def test_refuses_a_start_below_the_floor_with_the_measured_rate(tmp_path: Path) -> None:
    rate = validated(tmp_path)["val/all/avg@2"]
    watches = Watches()
    with pytest.raises(InputError) as caught:
        fit(tmp_path, InitialValidation(min_pass_rate=0.99), watches)
    assert str(caught.value) == (
        f"The policy starts with the sampled pass rate at {rate:.3f}, below `InitialValidation.min_pass_rate`=0.99, "
        "so that reinforcement would find next to nothing to learn from; warm-start it longer and point "
        "`model.policy.pretrained` to the result, or lower the floor."
    )
    assert watches.first == {}


def test_the_floor_itself_is_enough_and_another_metric_can_be_the_gate(tmp_path: Path) -> None:
    rates = validated(tmp_path)
    floor = rates["val/short/avg@2"] - 1e-6
    fit(tmp_path, InitialValidation(floor, metric="val/short/avg@2"), limit_train_batches=1, max_epochs=1)
    with pytest.raises(InputError, match=r"starts with `val/short/avg@2` at 0\.\d+, below"):
        fit(tmp_path, InitialValidation(floor + 1e-3, metric="val/short/avg@2"))


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs `val/short/avg@16` .* \(it gave .*val/short/avg@2.*set `metric`"):
        fit(tmp_path, InitialValidation(0.5, metric="val/short/avg@16"))
    with pytest.raises(InputError, match=r"needs the sampled pass rate .* \(it gave nothing\); give `data.validation`"):
        trainer_of(tmp_path, InitialValidation(0.5), val_check_interval=None).fit(rl_module(tmp_path), data(sets=()))


@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan")])
def test_a_floor_that_is_no_share_is_refused(floor: float) -> None:
    with pytest.raises(InputError, match=r"`InitialValidation.min_pass_rate`=.* is no share of the responses"):
        InitialValidation(floor)
