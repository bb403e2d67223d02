"""Whether the critic knows what it talks about: V against the pass rates of held-out problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.calibration import reliability_bins
from sppo_lightning.callbacks.run_summary import plain
from sppo_lightning.callbacks.sample_log import tensorboard_loggers
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import ProblemTable
from sppo_lightning.figures import calibration_figure
from sppo_lightning.files import replace_file


class CriticCalibration(Callback):
    """Draws V against the pass rates of held-out problems, and warns where their mean would be the better critic.

    Writes `calibration.png`, a reliability diagram over the problems of all validation sets, and
    `calibration.json`, its bins and metrics for each of them; the figure also goes to TensorBoard as
    `critic/calibration`. It costs nothing but the drawing: the validation has sampled and asked the critic. The
    more samples per prompt a validation has, the less of the distance from V is the pass rates' own noise.

    Warns when the Brier skill falls below 0, and again only after it was above; not before the first update.

    Args:
        path: Folder of the two files; made where it is missing.
        bins: Bins of V, of equal width on [0, 1].
        every_n_validations: Validations from one drawing to the next; the first has one, and so has the last of
            a `fit`.
    """

    def __init__(self, path: str = "runs/calibration", bins: int = 10, every_n_validations: int = 1) -> None:
        for name, value in {"bins": bins, "every_n_validations": every_n_validations}.items():
            if value < 1:
                raise InputError(f"`CriticCalibration.{name}`={value} draws nothing; use 1 or more.")
        self.path = Path(path)
        self.bins = bins
        self.every_n_validations = every_n_validations
        self.validations = 0  # with a critic, of this run and those that it resumes
        self._iteration: int | None = None  # iterations done at the last of them; None outside `fit`
        self._is_drawn = True  # the last of them
        self._is_worse = False  # than the mean, at the last of them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so where there is nothing to draw."""
        if getattr(pl_module, "critic", None) is None:
            rank_zero_info("CriticCalibration draws nothing: the model has no critic.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the critic with the mean, and draw if it is time."""
        problems = _with_values(pl_module)
        if trainer.sanity_checking or not problems:
            return
        self._is_drawn = self.validations % self.every_n_validations == 0
        self.validations += 1
        self._iteration = trainer.fit_loop.total_batch_idx + 1 if trainer.state.fn == TrainerFn.FITTING else None
        self._compare(trainer, _overall(problems))
        if self._is_drawn:
            self._draw(trainer, problems)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation, unless it is drawn."""
        if not self._is_drawn and (problems := _with_values(pl_module)):
            self._is_drawn = True
            self._draw(trainer, problems)

    def state_dict(self) -> dict[str, Any]:
        """The count of validations, and whether a warning is out."""
        return {"validations": self.validations, "is_worse": self._is_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.validations, self._is_worse = state_dict["validations"], state_dict["is_worse"]

    @property
    def _when(self) -> str:
        return "" if self._iteration is None else f" at iteration {self._iteration}"

    def _compare(self, trainer: Trainer, problems: ProblemTable) -> None:
        """Warn when the critic has become worse than the mean pass rate."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
            return  # nobody expects foresight of a critic that has not learned anything
        metrics = problems.critic(self.bins)
        skill = metrics.get("brier_skill")
        if skill is None:
            return
        if skill < 0 and not self._is_worse:
            rank_zero_warn(
                f"The critic foresees outcomes worse than the mean pass rate alone does: Brier skill {skill:.2f}, "
                f"squared error {metrics['brier']:.3f} on {len(problems)} held-out problems{self._when}. "
                "Advantages R − V are then noisier than with a constant for V. Raise the critic's learning rate "
                "(`model.critic_optimizer.lr`), warm the critic up before the policy learns from it, or use the "
                "batch mean as the baseline in its place."
            )
        self._is_worse = skill < 0

    def _draw(self, trainer: Trainer, problems: dict[str, ProblemTable]) -> None:
        if not trainer.is_global_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        data_sets = {name: self.describe(table) for name, table in problems.items()}
        report = {"iteration": self._iteration, "data_sets": data_sets}
        text = json.dumps(plain(report), indent=2, allow_nan=False)
        replace_file(self.path / "calibration.json", lambda path: path.write_text(text + "\n"))
        overall = _overall(problems)
        title = f"Critic calibration{self._when}"
        figure = calibration_figure(overall.values.numpy(), overall.pass_rates.numpy(), self.bins, title)
        replace_file(self.path / "calibration.png", lambda path: figure.savefig(path, dpi=150, format="png"))
        step = max((self._iteration or 0) - 1, 0)  # Lightning counts the scalars of a validation from 0
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_figure("critic/calibration", figure, step, close=False)

    def describe(self, problems: ProblemTable) -> dict[str, Any]:
        """What `calibration.json` says of the problems of a data set."""
        bins = reliability_bins(problems.values, problems.pass_rates, self.bins)
        return {
            "problems": len(problems),
            "samples_per_problem": problems.k,
            "value_mean": float(problems.values.mean()),
            "pass_rate_mean": float(problems.pass_rates.mean()),
            **problems.critic(self.bins),
            "bins": [asdict(b) for b in bins],
        }


def _with_values(module: LightningModule) -> dict[str, ProblemTable]:
    """The last validation's problems by data set, "all" first; only those that a critic has seen."""
    found: dict[str, ProblemTable] = module.evaluation.last_problems  # type: ignore[union-attr, assignment]
    known = {name: table for name, table in found.items() if not table.values.isnan().any()}
    return {**({"all": known["all"]} if "all" in known else {}), **known}


def _overall(problems: dict[str, ProblemTable]) -> ProblemTable:
    """All problems, or those of the only data set."""
    return next(iter(problems.values()))
