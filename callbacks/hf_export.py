"""What leaves the run: the policy and the critic as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class HFExport(Callback):
    """Saves the policy, and the critic beside it, as Hugging Face folders when training ends.

    The critic's folder is a text classifier of how solvable a prompt is: `pipeline("text-classification", …)`
    gives the label `solvable` with the score V, for the text that the critic would read. Where transformers has
    no classifier for the family, `sppo_lightning.models.classifiers.register_classifier` must come before.

    Args:
        path: Folder of the policy; the critic, where there is one, goes to its subfolder `critic`.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write model, generation config and tokenizer with `save_pretrained`."""
        if not trainer.is_global_zero:
            return
        self._save(pl_module.policy, self.path)
        if getattr(pl_module, "critic", None) is not None:
            self._save(pl_module.critic, self.path / "critic")
        rank_zero_info(f"Saved the trained model to {self.path}")

    def _save(self, owner, path: Path) -> None:
        owner.model.save_pretrained(path)
        owner.tokenizer.save_pretrained(path)
