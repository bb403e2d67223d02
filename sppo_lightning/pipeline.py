"""Pipeline stages: callbacks that run on every batch, in the order in which the YAML lists them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.batch import PromptBatch
from sppo_lightning.errors import InputError
from sppo_lightning.phases import phase


class Stage(Callback):
    """A callback that adds something to each batch, in `fit`, `validate`, `test` and `predict` alike.

    A subclass writes `process` and says in `requires` and `provides` what it needs on the batch and what it
    adds ("rollouts", "scores"). The order is checked at `setup`.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    phase: ClassVar[str] = ""  # where its seconds are counted: `time/<phase>`
    once: ClassVar[bool] = False  # whether it runs for the batch alone, and not for what a ResamplingStage adds

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Add this stage's results to `batch`; nothing that is there already may change."""
        raise NotImplementedError(f"{type(self).__name__} must define process().")

    def begin(self) -> None:
        """Forget what was counted for the batch before; `process` may then run more than once, for more prompts."""

    def run(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """`process`, with its seconds counted under `phase`."""
        start = time.perf_counter()
        with phase(f"`{self.phase}` ({type(self).__name__})"):
            self.process(batch, trainer, module)
        if self.phase:
            seconds: dict[str, float] = module.phase_seconds  # type: ignore[assignment]
            seconds[self.phase] = seconds.get(self.phase, 0.0) + time.perf_counter() - start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that what this stage requires is provided by a stage listed before it."""
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        check_requirements(self.requires, callbacks[: callbacks.index(self)], callbacks, type(self).__name__)

    def _start_batch(self, trainer: Trainer, module: LightningModule, batch: PromptBatch) -> None:
        def work() -> None:
            self.begin()
            self.run(batch, trainer, module)

        preemption = getattr(module, "preemption", None)
        work() if preemption is None else preemption.guard(work)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Run, unless the training step uses no stage at all, as in supervised learning."""
        if getattr(pl_module, "needs_in_fit", True):
            self._start_batch(trainer, pl_module, batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:  # noqa: D102
        self._start_batch(trainer, pl_module, batch)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:  # noqa: D102
        self._start_batch(trainer, pl_module, batch)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:  # noqa: D102
        self._start_batch(trainer, pl_module, batch)


class ResamplingStage(Stage):
    """A stage that has more responses sampled and scored, by the stages before it, once there are rewards.

    It comes after all outcome verifiers, and there is one of its kind. A callback before it that is no stage sees
    the batch as it was drawn.
    """

    requires = frozenset({"rollouts", "scores"})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all outcome verifiers come first, and that no other stage changes what is sampled."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        own = type(self).__name__
        for late in callbacks[callbacks.index(self) + 1 :]:
            name = type(late).__name__
            if "scores" in getattr(late, "provides", ()):
                raise InputError(
                    f"`trainer.callbacks` lists {own} before {name}, whose scores are part of the reward; move "
                    f"{name} above {own}."
                )
            if isinstance(late, ResamplingStage):
                raise InputError(
                    f"`trainer.callbacks` lists {own} and {name}, each of which decides alone what else is "
                    "sampled; keep one of them."
                )

    def sample(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Run the stages before this one on `batch`; a collective, for drawing and scoring may meet other ranks."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for stage in callbacks[: callbacks.index(self)]:
            if isinstance(stage, Stage) and not stage.once:
                stage.run(batch, trainer, module)


_SUGGESTED = {
    "rollouts": "sppo_lightning.callbacks.RolloutGeneration",
    "scores": "a verifier such as sppo_lightning.callbacks.MathVerifier",
}


def check_requirements(required: Iterable[str], before: Sequence[Any], callbacks: Sequence[Any], who: str) -> None:
    """Raise `InputError` when something in `required` is not provided by the callbacks `before`.

    `callbacks` are all of the trainer's, to tell a misordered stage from a missing one; `who` needs them.
    """
    for need in sorted(required):
        if any(need in getattr(callback, "provides", ()) for callback in before):
            continue
        late = [type(c).__name__ for c in callbacks if need in getattr(c, "provides", ())]
        if late:
            raise InputError(
                f"`trainer.callbacks` lists {who} before {late[0]}, which provides the {need} that it needs; "
                f"move {late[0]} above {who}."
            )
        raise InputError(
            f"`trainer.callbacks` has no stage that provides the {need} that {who} needs; "
            f"add {_SUGGESTED.get(need, need)} to it{'' if who == 'the module' else f' above {who}'}."
        )
