"""What leaves the run: the policy and the critic as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.models.adapters import save_adapter, save_merged


class HFExport(Callback):
    """Saves the policy, and the critic beside it, as Hugging Face folders when training ends.

    The critic's folder is a text classifier of how solvable a prompt is: `pipeline("text-classification", …)`
    gives the label `solvable` with the score V, for the text that the critic would read. Where transformers has
    no classifier for the family, `sppo_lightning.models.classifiers.register_classifier` must come before.

    Adapters (`lora`) are merged, so that these are whole models too; the adapters alone, with the critic's value
    head, go to the subfolder `adapter` of each, for peft.

    Args:
        path: Folder of the policy; the critic, where there is one, goes to its subfolder `critic`.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write model, generation config and tokenizer with `save_pretrained`."""
        self._save(pl_module.policy, self.path, trainer.is_global_zero)
        if getattr(pl_module, "critic", None) is not None:
            self._save(pl_module.critic, self.path / "critic", trainer.is_global_zero)
        rank_zero_info(f"Saved the trained model to {self.path}")

    def _save(self, owner: Any, path: Path, writes: bool) -> None:
        save_merged(owner.model, path, writes)  # on all ranks, each of which may hold a part
        if owner.lora is not None:
            save_adapter(owner.model, path / "adapter", owner.head_weights(), writes)
        if writes:
            owner.tokenizer.save_pretrained(path)
