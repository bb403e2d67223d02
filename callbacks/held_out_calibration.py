"""What the callbacks share that draw predictions against the outcomes of held-out problems."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure

from sppo_lightning.callbacks.run_summary import plain
from sppo_lightning.callbacks.sample_log import tensorboard_loggers
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import ProblemTable
from sppo_lightning.files import replace_file


class HeldOutCalibration(Callback, ABC):
    """Writes a figure and its numbers when a validation has ended, from what it has sampled anyway.

    A subclass says which problems it draws, what the files hold and what else it does with a validation.

    Args:
        path: Folder of the two files; made where it is missing.
        bins: Bins of the predictions on [0, 1].
        every_n_validations: Validations from one drawing to the next; the first has one, and so has the last of
            a `fit`.
    """

    file_name: ClassVar[str]  # of both files, without their ending
    tag: ClassVar[str]  # of the figure in TensorBoard

    def __init__(self, path: str, bins: int, every_n_validations: int) -> None:
        for name, value in {"bins": bins, "every_n_validations": every_n_validations}.items():
            if value < 1:
                raise InputError(f"`{type(self).__name__}.{name}`={value} draws nothing; use 1 or more.")
        self.path = Path(path)
        self.bins = bins
        self.every_n_validations = every_n_validations
        self.validations = 0  # with problems to draw, of this run and those that it resumes
        self._iteration: int | None = None  # iterations done at the last of them; None outside `fit`
        self._is_drawn = True  # the last of them

    def problems(self, module: LightningModule) -> dict[str, ProblemTable]:
        """The last validation's problems by data set, "all" first; empty where there is nothing to draw."""
        found: dict[str, ProblemTable] = module.evaluation.last_problems  # type: ignore[union-attr, assignment]
        return {**({"all": found["all"]} if "all" in found else {}), **found}

    @abstractmethod
    def note(self, trainer: Trainer, problems: dict[str, ProblemTable]) -> None:
        """Take in a validation, whether it is drawn or not."""

    @abstractmethod
    def report(self, problems: dict[str, ProblemTable]) -> dict[str, Any]:
        """What the JSON file says."""

    @abstractmethod
    def figure(self, problems: dict[str, ProblemTable]) -> Figure | None:
        """The picture; None where there is nothing to see."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the validation, and draw if it is time."""
        problems = self.problems(pl_module)
        if trainer.sanity_checking or not problems:
            return
        self._is_drawn = self.validations % self.every_n_validations == 0
        self.validations += 1
        self._iteration = trainer.fit_loop.total_batch_idx + 1 if trainer.state.fn == TrainerFn.FITTING else None
        self.note(trainer, problems)
        if self._is_drawn:
            self._draw(trainer, problems)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation, unless it is drawn."""
        if not self._is_drawn and (problems := self.problems(pl_module)):
            self._is_drawn = True
            self._draw(trainer, problems)

    @property
    def _when(self) -> str:
        return "" if self._iteration is None else f" at iteration {self._iteration}"

    def _draw(self, trainer: Trainer, problems: dict[str, ProblemTable]) -> None:
        if not trainer.is_global_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(self.report(problems)), indent=2, allow_nan=False)
        replace_file(self.path / f"{self.file_name}.json", lambda path: path.write_text(text + "\n"))
        figure = self.figure(problems)
        if figure is None:
            return
        replace_file(self.path / f"{self.file_name}.png", lambda path: figure.savefig(path, dpi=150, format="png"))
        step = max((self._iteration or 0) - 1, 0)  # Lightning counts the scalars of a validation from 0
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_figure(self.tag, figure, step, close=False)


def overall(problems: dict[str, ProblemTable]) -> ProblemTable:
    """All problems, or those of the only data set."""
    return next(iter(problems.values()))
