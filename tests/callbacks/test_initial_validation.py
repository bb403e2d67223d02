from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_run import ByRow, Recorder, data, sppo, stages, trainer_of, weights

from sppo_lightning.callbacks.initial_validation import InitialValidation
from sppo_lightning.errors import InputError


def quarter() -> ByRow:
    return ByRow(lambda row: float(row % 4 == 0))


def test_it_measures_what_validate_measures(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of([*stages(), InitialValidation(), recorder], val_check_interval=100)
    trainer.fit(sppo(tmp_path), datamodule=data())
    assert len(recorder.validations) == 1

    alone = trainer_of(stages())
    [expected, *_] = alone.validate(sppo(tmp_path), datamodule=data(), verbose=False)
    measured = {name: value for name, value in expected.items() if name.startswith("val/")}
    assert {"val/all/avg@2", "val/easy/greedy", "val/all/critic_pearson"} <= set(measured)
    assert recorder.validations[0] == pytest.approx(measured, abs=1e-7)


def test_its_metrics_reach_the_logger_before_the_first_update(tmp_path: Path) -> None:
    recorder, logger = Recorder(), CSVLogger(tmp_path)
    callbacks = [*stages(quarter()), InitialValidation(), recorder]
    trainer_of(callbacks, logger=logger, val_check_interval=100).fit(sppo(tmp_path), datamodule=data())
    header, first, *_ = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert float(row["val/all/avg@2"]) == 0.25
    assert row["step"] == "0"


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path: Path) -> None:
    runs = {}
    for name, extra in {"with": [InitialValidation()], "without": []}.items():
        module = sppo(tmp_path)
        trainer_of([*stages(), *extra], val_check_interval=2).fit(module, datamodule=data())
        runs[name] = weights(module)
    assert torch.equal(runs["with"], runs["without"])


def test_a_resumed_run_goes_straight_on(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_last=True)
    settings = {"val_check_interval": 100, "enable_checkpointing": True}
    trainer_of([*stages(), InitialValidation(), saver], **settings, max_steps=4).fit(
        sppo(tmp_path), datamodule=data()
    )
    recorder = Recorder()
    trainer = trainer_of([*stages(), InitialValidation(min_pass_rate=1.0), recorder], **settings, max_steps=6)
    trainer.fit(sppo(tmp_path), datamodule=data(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert trainer.global_step == 6
    assert recorder.validations == []


def test_the_gate_refuses_a_policy_below_the_floor_in_one_sentence(tmp_path: Path) -> None:
    trainer = trainer_of([*stages(quarter()), InitialValidation(min_pass_rate=0.3)])
    with pytest.raises(InputError) as refusal:
        trainer.fit(sppo(tmp_path), datamodule=data())
    assert str(refusal.value) == (
        "The policy starts with the sampled pass rate at 0.250, below `InitialValidation.min_pass_rate`=0.3, so "
        "that reinforcement would find next to nothing to learn from; warm-start it longer and point "
        "`model.policy.pretrained` to the result, or lower the floor."
    )
    assert trainer.global_step == 0


@pytest.mark.parametrize("settings", [{}, {"metric": "val/hard/greedy"}])
@pytest.mark.parametrize("names", [("hard",), ("easy", "hard")])
def test_the_gate_lets_a_policy_at_the_floor_pass(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, str]
) -> None:
    gate = InitialValidation(min_pass_rate=0.25, **settings)
    trainer = trainer_of([*stages(quarter()), gate], max_steps=2, val_check_interval=100)
    trainer.fit(sppo(tmp_path), datamodule=data(names))
    assert trainer.global_step == 2


def test_the_gate_reads_the_metric_that_is_named(tmp_path: Path) -> None:
    gate = InitialValidation(min_pass_rate=0.9, metric="val/easy/pass@2")
    with pytest.raises(InputError, match=r"with `val/easy/pass@2` at 0\.250, below .*=0\.9"):
        trainer_of([*stages(quarter()), gate]).fit(sppo(tmp_path), datamodule=data())


def test_a_gate_that_cannot_measure_says_so(tmp_path: Path) -> None:
    gate = InitialValidation(min_pass_rate=0.5, metric="val/esay/avg@2")
    with pytest.raises(InputError, match=r"needs `val/esay/avg@2` before .*val/easy/avg@2.* set `metric` to one"):
        trainer_of([*stages(), gate]).fit(sppo(tmp_path), datamodule=data())
    with pytest.raises(InputError, match=r"it gave nothing\); give `data.validation` a set"):
        trainer_of([*stages(), InitialValidation(0.5)]).fit(sppo(tmp_path), datamodule=data(()))


def test_a_floor_that_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"`InitialValidation.min_pass_rate`=20 is no share"):
        InitialValidation(min_pass_rate=20)
