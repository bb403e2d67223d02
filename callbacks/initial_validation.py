"""Where a run starts from, and the gate that keeps it from starting too low."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import by_dataset
from sppo_lightning.resuming import starts_afresh, validate_in_fit


class InitialValidation(Callback):
    """Runs all validation sets once before the first update of a fresh `fit`; a resumed one goes straight on.

    The metrics reach loggers and callbacks like any other validation's. A policy that almost never succeeds
    has nothing to reinforce, so a run that starts below `min_pass_rate` is refused, not spent on zeros.

    Args:
        min_pass_rate: The run is refused where the pass rate measured before the first update is below this
            share, from 0 (never refused) to 1.
        metric: Name of the validation metric that is that pass rate, such as `val/gsm8k/avg@4`; left out:
            `val/all/avg@k`, or `val/<dataset>/avg@k` of the only validation set.
    """

    def __init__(self, min_pass_rate: float = 0.0, metric: str | None = None) -> None:
        if not 0 <= min_pass_rate <= 1:
            raise InputError(
                f"`InitialValidation.min_pass_rate`={min_pass_rate} is no share of the responses; "
                "use a number from 0 to 1."
            )
        self.min_pass_rate = min_pass_rate
        self.metric = metric

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, and refuse to go on from below `min_pass_rate`.

        Raises:
            InputError: Where the measured pass rate is below `min_pass_rate`, or cannot be measured.
        """
        if not starts_afresh(trainer):
            return
        validate_in_fit(trainer)
        if self.min_pass_rate:
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self.metric is None:
            name, rates = "the sampled pass rate", by_dataset(trainer.callback_metrics, r"avg@\d+")
            rate = rates.get("all")
        else:
            name = f"`{self.metric}`"
            value = trainer.callback_metrics.get(self.metric)
            rate = None if value is None else float(value)
        if rate is None:
            known = [key for key in trainer.callback_metrics if key.startswith("val/")]
            raise InputError(
                f"`InitialValidation.min_pass_rate`={self.min_pass_rate:g} needs {name} before the first "
                f"update, which the validation did not give (it gave {', '.join(known) or 'nothing'}); "
                f"{'set `metric` to one of these' if known else 'give `data.validation` a set'} "
                "or remove `min_pass_rate`."
            )
        if rate < self.min_pass_rate:
            raise InputError(
                f"The policy starts with {name} at {rate:.3f}, below `InitialValidation.min_pass_rate`="
                f"{self.min_pass_rate:g}, so that reinforcement would find next to nothing to learn from; "
                "warm-start it longer and point `model.policy.pretrained` to the result, or lower the floor."
            )
