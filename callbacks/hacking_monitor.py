"""The stage that watches whether the policy solves the problems or learns to please the verifiers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks.hacking_checks import run_checks
from sppo_lightning.callbacks.hacking_examples import write_examples
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.folders import run_folder, save_to_go_on_from
from sppo_lightning.pipeline import Stage
from sppo_lightning.ranks import gather_objects
from sppo_lightning.suspicion import Record, means, merge, suspects, worst
from sppo_lightning.verification.drift import Limits, Series, alarms
from sppo_lightning.verification.hacking import read

EXAMPLES = "hacking_examples.jsonl"
_VALIDATIONS = 2  # for a held-out gap's mean: the score in training is of earlier weights, so single gaps sway


class HackingMonitor(Stage):
    """Watches for reward hacking: checks that never enter the reward, and figures of the responses over training.

    Logs `hacking/…`, and warns once when the recent mean of a figure has moved past its limit, against the first
    `window` iterations or against the best that it was. It changes no reward and no advantage. List it last: below
    all other stages, and so that the checkpoint of `stop_on_alarm` holds what the other callbacks counted.

    A check that fails stops nothing: its failures are counted in `hacking/<check>/failures` and warned about once,
    and past its own `max_failure_rate` it says nothing about that batch.

    Args:
        checks: Verifiers with the role outcome, run here and not listed in `trainer.callbacks`: another grader, or
            tests that the reward does not see. They are set up and torn down with the run; no other hook is called.
        check_every_n_iterations: Iterations from one run of the checks, and one look for examples, to the next.
        max_checked_responses: Responses that each check sees, per rank, in one iteration, and in one validation.
        window: Iterations that the means are over and that the figures at first are taken from; for checks, so many
            of their runs as there are in them.
        limits: How far each figure may move.
        ngram_words: Words of the n-grams that are counted as repeated.
        min_reasoning_characters: Characters outside the final answer below which a response has no reasoning.
        examples: Worst responses of the last `window` iterations in `hacking_examples.jsonl` and in TensorBoard; 0
            for none.
        stop_on_alarm: Stop the run at the first alarm of each kind, with a checkpoint beside the run's others.
        path: Folder of the examples, and of that checkpoint where the run saves no others; the run's log folder
            where none is given.
    """

    requires = frozenset({"rollouts", "scores"})
    phase = "monitor"

    def __init__(
        self,
        checks: list[Verifier] | None = None,
        check_every_n_iterations: int = 5,
        max_checked_responses: int = 64,
        window: int = 20,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        ngram_words: int = 4,
        min_reasoning_characters: int = 20,
        examples: int = 10,
        stop_on_alarm: bool = False,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.checks = list(checks or [])
        self.check_every_n_iterations = check_every_n_iterations
        self.max_checked_responses = max_checked_responses
        self.window = window
        self.limits = limits
        self.ngram_words = ngram_words
        self.min_reasoning_characters = min_reasoning_characters
        self.examples = examples
        self.stop_on_alarm = stop_on_alarm
        self.path = None if path is None else Path(path)
        self._check_settings()
        self.series: dict[str, Series] = {}  # by the metric's name without `hacking/`
        self.worst: list[dict[str, Any]] = []
        self.fired: list[str] = []  # the figures that there was an alarm about
        self.failed: list[str] = []  # the checks that there was a warning about
        self._validated_at: int | None = None  # `global_step`, since a resumed run may repeat a validation
        self._held_out: list[Record] = []  # of the validation at hand, on this rank
        self._folder = Path()
        self._must_stop = False

    # ------------------------------------------------------------------ with the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the place and the names, set the checks up and find the run's folder."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for late in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(late, Stage):
                name = type(late).__name__
                raise InputError(
                    f"`trainer.callbacks` lists HackingMonitor before {name}, which may change what it watches; "
                    f"move HackingMonitor below {name}."
                )
        for other in callbacks:
            if isinstance(other, Verifier) and other.name in (check.name for check in self.checks):
                raise InputError(
                    f"`HackingMonitor.checks` has {other.name!r}, which is also the name of a verifier in "
                    "`trainer.callbacks`; give the check a `name` of its own."
                )
        for check in self.checks:
            check.setup(trainer, pl_module, stage)
        self._folder = self.path or Path(run_folder(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End what the checks hold."""
        for check in self.checks:
            check.teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End what the checks hold."""
        for check in self.checks:
            check.on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, the examples, and what has been warned about."""
        return {
            "series": {name: each.state_dict() for name, each in self.series.items()},
            "worst": list(self.worst),
            "fired": list(self.fired),
            "failed": list(self.failed),
            "validated_at": self._validated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        for name, saved in state_dict["series"].items():
            self._series(name).load_state_dict(saved)
        self.worst, self.fired, self.failed = (list(state_dict[name]) for name in ("worst", "fired", "failed"))
        self._validated_at = state_dict["validated_at"]

    # ------------------------------------------------------------------ what is watched

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Watch a batch that is trained on, or take note of one that is validated on."""
        if trainer.training:
            self._watch(batch, trainer, module)
        elif trainer.validating:
            assert batch.rollouts is not None
            record, batches = Record(), max(1, sum(trainer.num_val_batches))
            record.score(batch.rollouts.scores)
            share = math.ceil(self.max_checked_responses / batches)
            run_checks(self.checks, record, batch, trainer, module, max(1, share))
            self._held_out.append(record)

    def _watch(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        rollouts, iteration = batch.rollouts, trainer.fit_loop.total_batch_idx + 1
        assert rollouts is not None
        is_due = (iteration - 1) % self.check_every_n_iterations == 0
        pairs = zip(rollouts.responses, rollouts.prompts, strict=True)
        readings = [read(response, prompt.gold, self.ngram_words) for response, prompt in pairs]
        record = Record()
        record.read(rollouts, readings, self.min_reasoning_characters)
        record.score(rollouts.scores)
        if is_due:
            checked = run_checks(self.checks, record, batch, trainer, module, self.max_checked_responses)
            found = suspects(rollouts, readings, checked, self.min_reasoning_characters, iteration)
            record.examples = worst(found, self.examples)
        record = _over_ranks([record])
        record.sums["distinct_responses"] = record.distinct()
        for name, each in record.sums.items():
            self._series(name).add(*each)
        for name, each in record.scores.items():
            self._series(f"{name}/train").add(*each)
        if is_due and self.examples:
            recent = [example for example in self.worst if example["iteration"] > iteration - self.window]
            self.worst = worst([*record.examples, *recent], self.examples)
            if trainer.is_global_zero:
                write_examples(self._file, self.worst, trainer)
        metrics = {f"hacking/{name}": value for name, value in record.metrics().items()}
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)
        self._warn(record, iteration)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        self._held_out = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the checks say of held-out responses and, while training, what was paid for more in training."""
        if trainer.sanity_checking:
            return
        record, self._held_out = _over_ranks(self._held_out), []
        metrics = {"/held_out_".join(name.rsplit("/", 1)): value for name, value in record.metrics().items()}
        if trainer.state.fn == TrainerFn.FITTING:
            metrics |= self._train_minus_held_out(means(record.scores), trainer)
        metrics = {f"hacking/{name}": value for name, value in metrics.items()}
        pl_module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)
        self._warn(record, trainer.fit_loop.total_batch_idx + 1)

    def _train_minus_held_out(self, held_out: dict[str, float], trainer: Trainer) -> dict[str, float]:
        """The gap of each verifier, in its own unit; its series is in the reward's, which limits are in."""
        gaps: dict[str, float] = {}
        for verifier in (each for each in trainer.callbacks if isinstance(each, Verifier)):  # type: ignore[attr-defined]
            name, train = verifier.name, self._series(f"{verifier.name}/train").recent
            if train is not None and name in held_out:
                gaps[f"{name}/train_minus_held_out"] = gap = train - held_out[name]
                if trainer.global_step != self._validated_at:
                    weight = verifier.weight if verifier.role == "shaping" else 1.0
                    self._series(f"{name}/train_minus_held_out").add(weight * gap, 1)
        self._validated_at = trainer.global_step
        return gaps

    def _series(self, name: str) -> Series:
        if name not in self.series:
            window = self.window
            if "/" in name and not name.endswith("/train"):
                window = max(1, window // self.check_every_n_iterations)
            self.series[name] = Series(_VALIDATIONS if name.endswith("/train_minus_held_out") else window)
        return self.series[name]

    # ------------------------------------------------------------------ what is done about it

    def _warn(self, record: Record, iteration: int) -> None:
        """Warn of what is new: a check that failed, a figure past its limit. The same on every rank."""
        for name, cause in record.causes.items():
            if name not in self.failed:
                self.failed.append(name)
                rank_zero_warn(
                    f"The check {name!r} of HackingMonitor failed on {record.failures[name]} responses at "
                    f"iteration {iteration} ({cause}); its figures leave them out, and training goes on."
                )
        for alarm in alarms(self.series, self.limits):
            if alarm.figure not in self.fired:
                self.fired.append(alarm.figure)
                self._must_stop = self.stop_on_alarm
                where = f"; the worst examples are in {self._file}" if self.examples else ""
                rank_zero_warn(f"At iteration {iteration} {alarm.sentence}{where}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Stop here, where a checkpoint resumes exactly, if an alarm asks for it."""
        self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if an alarm of the validation asks for it."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if not self._must_stop:
            return
        self._must_stop = False
        file = save_to_go_on_from(trainer, f"alarm-step={trainer.global_step}.ckpt", str(self._folder))
        trainer.should_stop = True
        rank_zero_warn(
            f"HackingMonitor stops the run; after a look at the examples, go on with `--ckpt_path {file}`, where "
            "an alarm that was raised is not raised again."
        )

    @property
    def _file(self) -> Path:
        return self._folder / EXAMPLES

    def _check_settings(self) -> None:
        least = {"check_every_n_iterations": 1, "max_checked_responses": 1, "window": 1, "ngram_words": 1}
        least |= {"min_reasoning_characters": 0, "examples": 0}
        for name, minimum in least.items():
            if (value := getattr(self, name)) < minimum:
                raise InputError(f"`HackingMonitor.{name}`={value} is too small; use {minimum} or more.")
        names: set[str] = set()
        for check in self.checks:
            if check.role != "outcome":
                raise InputError(
                    f"`HackingMonitor.checks` has {check.name!r} with `role`={check.role}, which cannot be "
                    "compared with a reward; use a verifier with the role outcome."
                )
            if check.name in names:
                raise InputError(
                    f"`HackingMonitor.checks` has two checks named {check.name!r}; give one of them another `name`."
                )
            names.add(check.name)


def _over_ranks(own: list[Record]) -> Record:
    """All ranks' records as one. One collective, so every rank calls it, and comes to the same conclusions."""
    return merge(gather_objects(merge(own)))
