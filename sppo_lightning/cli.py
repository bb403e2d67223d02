"""The command line: LightningCLI with every component swapped by class path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.cli_checks import check_process, check_trainer
from sppo_lightning.cli_export import export_checkpoint
from sppo_lightning.cli_failures import failures_told
from sppo_lightning.cli_names import options_of
from sppo_lightning.cli_parser import Parser
from sppo_lightning.cli_trainer import check_checkpoint, told_in_one_sentence
from sppo_lightning.config_files import (
    as_text,
    check_components,
    merge,
    read,
    split_arguments,
    with_unknown_as_null,
)
from sppo_lightning.errors import InputError, shortened
from sppo_lightning.masking import masked_text


class SaveConfig(SaveConfigCallback):
    """Writes the whole config to the log's folder, and gives it to the module, whose checkpoints hold it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`, and note the same text in the module."""
        super().setup(trainer, pl_module, stage)
        pl_module.run_config = self.parser.dump(self.config, skip_unset=False)


class SPPOCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` with any components; `export` of a checkpoint."""

    def __init__(self, *components: Any, **settings: Any) -> None:
        words = sys.argv[1:] if settings.get("args") is None else settings["args"]
        self.arguments = list(map(str, words)) if isinstance(words, list | tuple) else None
        with failures_told(self):
            super().__init__(*components, **settings)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Lightning's commands, and the one that needs no trainer."""
        super()._add_subcommands(parser, **kwargs)
        settings = Parser(description="Write the models of a checkpoint as Hugging Face folders.")
        settings.add_function_arguments(export_checkpoint)
        self._subcommand_parsers["export"] = settings
        action: Any = parser._subcommands_action
        action.add_subcommand("export", settings, help=settings.description)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The command's parser, without its settings where another command is asked for: they take time to add."""
        asked = {*self.subcommands(), "export"} & set(self.arguments or ())
        if not asked or subcommand in asked:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            if subcommand in ("validate", "test"):
                parser.set_defaults(verbose=False)  # the module prints a table with a column per data set
            parser.set_defaults(weights_only=True)  # Lightning would let a checkpoint from the network run code
            return parser
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings that belong to the process and not to a component."""
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of one process; left out: torch's own choice, the number of physical cores. For "
            "models of a few million parameters one thread is the fastest.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the config files as one, and the settings of the command line on top of it."""
        if self.arguments is None:
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_args(self._with_one_config(self.arguments))

    def _with_one_config(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with their config files merged into one, as text, before all settings."""
        names, others = split_arguments(arguments)
        commands: dict[str, LightningArgumentParser] = getattr(self, "_subcommand_parsers", {})
        command = next((word for word in others if word in commands), None)
        if not names or (commands and command is None):
            return others
        parser = self.parser if command is None else commands[command]
        merged = merge(map(read, names))
        check_components(merged)
        config = as_text(with_unknown_as_null(merged, options_of(parser)))
        place = 0 if command is None else others.index(command) + 1
        return [*others[:place], f"--config={config}", *others[place:]]

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; the hyperparameters that are looked for in it otherwise are never saved."""
        settings = self.config.get(str(self.config.get("subcommand")))
        if settings is not None and settings.get("ckpt_path"):
            check_checkpoint(settings["ckpt_path"], settings.get("weights_only"))

    def _settle_threads(self) -> None:
        """Say how many threads compute: on shared cores two can be slower than one."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            torch.set_num_threads(threads)
        rank_zero_info(f"CPU threads: {torch.get_num_threads()}")

    def _set_seed(self) -> None:
        """Seed all that is random, by what is a seed; an export is not."""
        if self.subcommand != "export":
            check_process(self._get(self.config, "threads"), self._get(self.config, "seed_everything"))
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build the components; an export needs none of them but the module."""
        if self.subcommand != "export":
            self._settle_threads()
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it refuses is told in one sentence."""
        settings = self._get(self.config, "trainer")
        if not isinstance(settings, Namespace):
            raise InputError(f"`trainer`={shortened(settings)} must hold settings by name.")
        with told_in_one_sentence(settings["accelerator"]):
            trainer = super().instantiate_trainer(**kwargs)
        check_trainer(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; what the trainer refuses is told in one sentence."""
        if subcommand == "export":
            export_checkpoint(**self.config[subcommand].as_dict())
            return
        with told_in_one_sentence():
            super()._run_subcommand(subcommand)


def command_line(args: Any = None, run: bool = True) -> SPPOCLI:
    """Parse, build the components and, unless told otherwise, run the command.

    Args:
        args: The arguments; those of the process when left out.
        run: Expect a command (`fit`, …) and run it; if false, expect none and only build.
    """
    return SPPOCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"prog": "python -m sppo_lightning", "allow_abbrev": False},
        args=args,
        run=run,
    )


def main(args: Any = None) -> None:
    """Run the command line; a mistake in the input ends it with one sentence and status 2."""
    try:
        command_line(args)
    except InputError as error:
        sys.stderr.write(f"error: {masked_text(str(error))}\n")
        sys.exit(2)
