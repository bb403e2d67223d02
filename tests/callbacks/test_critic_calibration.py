import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import ByRow, Recorder, data, sft, sppo, stages, trainer_of

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import CriticCalibration, InitialValidation, Verifier
from sppo_lightning.errors import InputError

PNG = b"\x89PNG"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "calibration.json").read_text())


class Pairs(Callback):
    """V and pass rate of each held-out problem, as the module knows them after each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problems: dict[str, Any] = pl_module.evaluation.last_problems  # type: ignore[union-attr, assignment]
        self.seen.append({name: (t.values.numpy(), t.pass_rates.numpy()) for name, t in problems.items()})


def test_an_untrained_critic_by_hand(tmp_path: Path) -> None:
    """V is ½ for every prompt; of the 8 problems of each set those of rows 0 and 1 are always solved, 2 half."""
    scores = {0: 1.0, 1: 1.0, 2: 0.5}
    calibration = CriticCalibration(str(tmp_path / "picture"))
    trainer = trainer_of([*stages(ByRow(lambda row: scores.get(row, 0.0))), calibration])
    with pytest.warns(UserWarning, match=r"Brier skill -0\.19, squared error 0\.219 on 16 held-out problems\. "):
        trainer.validate(sppo(tmp_path), datamodule=data(), verbose=False)
    mean = 2.5 / 8
    variance = 2.25 / 8 - mean**2
    brier = (7 * 0.25 + 0) / 8
    error = math.sqrt(variance * 16 / 15) / 4
    found = read(tmp_path / "picture")
    assert found["iteration"] is None
    assert list(found["data_sets"]) == ["all", "easy", "hard"]
    assert found["data_sets"]["all"] == {
        "problems": 16,
        "samples_per_problem": 2,
        "value_mean": 0.5,
        "pass_rate_mean": mean,
        "brier": pytest.approx(brier, abs=1e-6),
        "brier_skill": pytest.approx(1 - brier / variance, abs=1e-6),
        "pearson": 0.0,
        "spearman": 0.0,
        "calibration_error": pytest.approx(0.5 - mean, abs=1e-6),
        "auroc": 0.5,
        "bins": [
            {
                "low": 0.5,
                "high": 0.6,
                "count": 16,
                "value_mean": 0.5,
                "outcome_mean": mean,
                "standard_error": pytest.approx(error, abs=1e-6),
            }
        ],
    }
    assert found["data_sets"]["easy"]["problems"] == 8
    assert (tmp_path / "picture" / "calibration.png").read_bytes().startswith(PNG)
    assert sorted(p.name for p in (tmp_path / "picture").iterdir()) == ["calibration.json", "calibration.png"]


def test_a_trained_critics_numbers_are_those_of_its_problems(tmp_path: Path) -> None:
    calibration, pairs, recorder = CriticCalibration(str(tmp_path / "picture"), bins=5), Pairs(), Recorder()
    chain = [*stages(), InitialValidation(), calibration, pairs, recorder]
    logger = TensorBoardLogger(tmp_path)
    trainer_of(chain, val_check_interval=2, logger=logger).fit(sppo(tmp_path), datamodule=data())
    found = read(tmp_path / "picture")
    assert found["iteration"] == 4
    for name, (values, rates) in pairs.seen[-1].items():
        numbers = found["data_sets"][name]
        brier = np.mean((values - rates) ** 2)
        assert numbers["problems"] == len(rates) == (16 if name == "all" else 8)
        assert numbers["brier"] == pytest.approx(brier, abs=2e-6)
        assert numbers["brier_skill"] == pytest.approx(1 - brier / rates.var(), abs=2e-5)
        assert numbers["pearson"] == pytest.approx(np.corrcoef(values, rates)[0, 1], abs=2e-6)
        edges = np.minimum(np.floor(values * 5), 4)
        expected = [(i / 5, values[edges == i].mean(), rates[edges == i].mean()) for i in np.unique(edges)]
        bins = [(b["low"], b["value_mean"], b["outcome_mean"]) for b in numbers["bins"]]
        assert bins == [pytest.approx(row, abs=2e-6) for row in expected]
        logged = recorder.validations[-1]
        for kind in ("brier", "brier_skill", "pearson", "spearman"):
            assert numbers[kind] == pytest.approx(logged[f"val/{name}/critic_{kind}"], abs=2e-6)
    # the figure stands where the validation's numbers stand
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    steps = [event.step for event in events.Scalars("val/all/critic_pearson")]
    assert [image.step for image in events.Images("critic/calibration")] == steps == [0, 1, 3]


@pytest.mark.parametrize(("every", "drawn"), [(1, [0, 2, 4, 6]), (2, [0, 4, 6]), (10, [0, 6])])
def test_the_first_and_the_last_validation_are_drawn_and_every_so_many(
    every: int, drawn: list[int], tmp_path: Path
) -> None:
    calibration, noted = CriticCalibration(str(tmp_path / "picture"), every_n_validations=every), []

    class Notes(Callback):
        """What `calibration.json` says after each hook that may write it."""

        def on_validation_end(self, *_: Any) -> None:
            noted.append(read(tmp_path / "picture")["iteration"])

        on_fit_end = on_validation_end

    # two epochs of four iterations, of which the last one is not followed by a validation
    chain = [*stages(), InitialValidation(), calibration, Notes()]
    trainer_of(chain, val_check_interval=2, max_epochs=2, max_steps=14).fit(sppo(tmp_path), datamodule=data())
    assert sorted(set(noted)) == drawn


class FirstHalf(Verifier):
    """Solved where the prompt begins with a to d; in the validations that `flips` names, where it does not."""

    def __init__(self, *flips: int) -> None:
        super().__init__()
        self.flips = flips
        self.validation = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation += 1

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        flipped = prompts[0].dataset != "train" and self.validation in self.flips
        return [float((prompt.text[0] in "abcd") != flipped) for prompt in prompts]


def warned(
    tmp_path: Path, calibration: CriticCalibration, *flips: int, **settings: Any
) -> tuple[list[str], list[float]]:
    """The warnings of a run with five validations, and the Brier skill at each of them."""
    recorder = Recorder()
    chain = [*stages(FirstHalf(*flips)), calibration, recorder]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(chain, **({"val_check_interval": 8, "max_epochs": 10} | settings)).fit(
            sppo(tmp_path), datamodule=data(("held_out",))
        )
    messages = [str(warning.message) for warning in caught if "foresees" in str(warning.message)]
    return messages, [row["val/held_out/critic_brier_skill"] for row in recorder.validations]


@pytest.mark.slow
def test_a_critic_worse_than_the_mean_is_warned_of_once_per_crossing(tmp_path: Path) -> None:
    calibration = CriticCalibration(str(tmp_path / "picture"), every_n_validations=100)
    messages, skills = warned(tmp_path, calibration, 0, 1, 3, 4)
    assert [skill < 0 for skill in skills] == [True, True, False, True, True]
    assert len(messages) == 2
    assert f"Brier skill {skills[0]:.2f}" in messages[0]
    assert "8 held-out problems at iteration 8." in messages[0]
    assert f"Brier skill {skills[3]:.2f}" in messages[1]
    assert "at iteration 32" in messages[1]
    assert "`model.critic_optimizer.lr`" in messages[0]
    resumed = CriticCalibration(str(tmp_path / "picture"))
    resumed.load_state_dict(calibration.state_dict())
    messages, skills = warned(tmp_path, resumed, 0, max_epochs=2)
    assert [skill < 0 for skill in skills] == [True]
    assert messages == []  # the run that it resumes has said so
    assert resumed.validations == 6


def test_a_critic_better_than_the_mean_is_not_warned_of(tmp_path: Path) -> None:
    messages, skills = warned(tmp_path, CriticCalibration(str(tmp_path / "picture")), max_epochs=4)
    assert min(skills) > 0
    assert messages == []


def test_before_the_first_update_nobody_expects_foresight(tmp_path: Path) -> None:
    # row 0 alone is solved, so ½ is far off; but the critic has not learned anything yet
    calibration = CriticCalibration(str(tmp_path / "picture"))
    chain = [*stages(ByRow(lambda row: float(row == 0))), InitialValidation(), calibration]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(chain, val_check_interval=100, max_steps=2).fit(sppo(tmp_path), datamodule=data())
    assert not [w for w in caught if "foresees" in str(w.message)]
    assert read(tmp_path / "picture")["data_sets"]["all"]["brier_skill"] < 0


def test_a_sanity_check_and_a_model_without_a_critic_leave_nothing(tmp_path: Path) -> None:
    chain = [*stages(), CriticCalibration(str(tmp_path / "sanity"))]
    trainer_of(chain, val_check_interval=100, max_steps=2, num_sanity_val_steps=1).fit(
        sppo(tmp_path), datamodule=data()
    )
    chain = [*stages(), CriticCalibration(str(tmp_path / "sft"))]
    trainer_of(chain, val_check_interval=1, max_steps=1).fit(sft(), datamodule=data())
    assert not (tmp_path / "sanity").exists()
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("setting", ["bins", "every_n_validations"])
def test_settings_that_draw_nothing_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"`CriticCalibration.{setting}`=0 draws nothing; use 1 or more"):
        CriticCalibration(**{setting: 0})  # type: ignore[arg-type]
