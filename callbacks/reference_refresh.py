"""The stage that moves the reference policy towards the policy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.errors import InputError
from sppo_lightning.models.policy import AdapterFreePolicy


class ReferenceRefresh(Callback):
    """Moves the reference to `mix × policy + (1 − mix) × reference` every so many policy updates.

    Args:
        every_n_updates: Policy updates (`trainer.global_step`) between refreshes. An iteration makes several;
            the refresh comes after the iteration that reaches or passes the multiple.
        mix: Share of the policy in the new reference, above 0 and at most 1; 1 copies the policy.
    """

    def __init__(self, every_n_updates: int = 10, mix: float = 1.0) -> None:
        super().__init__()
        if every_n_updates < 1:
            raise InputError(
                f"`ReferenceRefresh.every_n_updates`={every_n_updates} is no interval; use 1 or more, or "
                "leave ReferenceRefresh out of `trainer.callbacks` for a fixed reference."
            )
        if not 0 < mix <= 1:
            raise InputError(
                f"`ReferenceRefresh.mix`={mix} is no share of the policy; use a number above 0 and at most 1."
            )
        self.every_n_updates = every_n_updates
        self.mix = mix
        self._checked_at: int | None = None  # updates made when last asked whether a refresh is due

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a reference to refresh, now that the module has loaded what it uses."""
        reference = getattr(pl_module, "reference", None)
        if reference is None:
            raise InputError(
                "`trainer.callbacks` lists ReferenceRefresh, but `model.kl_coef` is 0 and nothing else uses "
                "a reference; raise `model.kl_coef` above 0 or remove ReferenceRefresh."
            )
        if isinstance(reference, AdapterFreePolicy):
            raise InputError(
                "`trainer.callbacks` lists ReferenceRefresh, but with `model.policy.lora` the reference is the "
                "base model, which does not move; remove ReferenceRefresh or train without `lora`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here where no checkpoint says otherwise."""
        if self._checked_at is None:
            self._checked_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh where the iteration reached or passed a multiple of `every_n_updates`."""
        before, self._checked_at = self._checked_at or 0, trainer.global_step
        if self._checked_at // self.every_n_updates > before // self.every_n_updates:
            pl_module.refresh_reference(self.mix)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """The number of updates up to which refreshes were made."""
        return {"checked_at": self._checked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of a checkpoint."""
        self._checked_at = state_dict["checked_at"]
