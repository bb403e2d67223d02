"""The callback that tells when a run collapses, what that often comes from and what to try."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import PromptBatch
from sppo_lightning.collapse import Collapse, CollapseLimits
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import check_requirements


class CollapseMonitor(Callback):
    """Warns when exploration, length, reward, ratio or critic collapse, with the likely causes and what to try.

    It reads what is logged anyhow, and computes nothing on the device. Each symptom is warned of once, and again
    only after it was away for a whole window. List it below RolloutGeneration.

    Args:
        window: Iterations that the means of entropy, lengths and clip fraction are over.
        uniform_iterations: Iterations with a reward of 0, or of 1, for every response, after which there is a
            warning.
        critic_window: Iterations after its warm-up that the critic's skill is looked at over.
        limits: Where a mean is a symptom.
    """

    def __init__(
        self,
        window: int = 10,
        uniform_iterations: int = 5,
        critic_window: int = 50,
        limits: CollapseLimits = CollapseLimits(),  # noqa: B008 (frozen)
    ) -> None:
        windows = {"window": window, "uniform_iterations": uniform_iterations, "critic_window": critic_window}
        for name, value in windows.items():
            if value < 1:
                raise InputError(f"`CollapseMonitor.{name}`={value} is too small; use 1 or more.")
        metrics = ["policy/entropy", "rollout/response_tokens_mean", "rollout/truncated_fraction"]
        metrics.append("policy/clip_fraction")
        own = {"reward/mean": uniform_iterations, "critic/brier_skill": critic_window}
        self.collapse = Collapse(dict.fromkeys(metrics, window) | own, limits)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that responses are sampled, and their lengths logged, before they are looked at."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and getattr(pl_module, "needs_in_fit", None):
            before = callbacks[: callbacks.index(self)]
            check_requirements({"rollouts"}, before, callbacks, type(self).__name__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Look at the iteration; the same on every rank."""
        if batch.rollouts is None:  # supervised learning explores nothing
            return
        # the trainer shows figures of earlier iterations where this one has none, but of responses it always has
        figures: dict[str, Any] = dict(pl_module.last_figures)  # type: ignore[arg-type]
        figures |= {name: value for name, value in trainer.callback_metrics.items() if name.startswith("rollout/")}
        if figures.get("critic/warming_up"):
            figures.pop("critic/brier_skill", None)
        seen = {name: float(figures[name]) for name in self.collapse.series if name in figures}
        for sentence in self.collapse.observe(seen):
            rank_zero_warn(f"At iteration {trainer.fit_loop.total_batch_idx + 1} {sentence}")

    def state_dict(self) -> dict[str, Any]:
        """The windows, and what was warned of."""
        return self.collapse.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.collapse.load_state_dict(state_dict)
