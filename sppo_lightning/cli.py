"""The command line: LightningCLI with every component swapped by class path."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.errors import InputError


class SPPOCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` with any module, data module and callbacks."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that belong to the process and not to a component."""
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of one process; left out: torch's own choice, the number of physical cores. For "
            "models of a few million parameters one thread is the fastest.",
        )

    def before_instantiate_classes(self) -> None:
        """Settle the number of threads, and say it: on shared cores two can be slower than one."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            if threads < 1:
                raise InputError(f"`threads`={threads} leaves no thread to compute with; use 1 or more.")
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()  # its bars for loading and saving break ours
        rank_zero_info(f"CPU threads: {torch.get_num_threads()}")


def main(args: Any = None) -> None:
    """Run the command line; a mistake in the input ends it with one sentence and status 2."""
    try:
        SPPOCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "python -m sppo_lightning"},
            args=args,
        )
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
