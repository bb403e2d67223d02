"""What leaves the run when it ends."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.errors import check_option
from sppo_lightning.exporting import Adapters, export


class HFExport(Callback):
    """Saves the policy, and the critic beside it, as Hugging Face folders when training ends.

    The critic's folder is a text classifier of how solvable a prompt is: `pipeline("text-classification", …)`
    gives the label `solvable` with the score V, for the text that the critic would read. Where transformers has
    no classifier for the family, `sppo_lightning.models.classifiers.register_classifier` must come before.

    `python -m sppo_lightning export` writes the same of a checkpoint.

    Args:
        path: Folder of the policy; the critic, where there is one, goes to its subfolder `critic`.
        adapters: What becomes of adapters (`lora`): `merged` into a whole model, `alone` in a folder for peft, with
            the critic's value head, or `both`, those alone in the subfolder `adapter`.
    """

    def __init__(self, path: str, adapters: Adapters = "both") -> None:
        check_option("HFExport.adapters", adapters, Adapters)
        self.path = Path(path)
        self.adapters: Adapters = adapters

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write model, generation config, tokenizer and card."""
        export(pl_module, self.path, self.adapters, writes=trainer.is_global_zero)
        rank_zero_info(f"Saved the trained model to {self.path}")
