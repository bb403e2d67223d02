"""The command line: LightningCLI with every component swapped by class path."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.cli_errors import sentence
from sppo_lightning.errors import InputError


class Parser(LightningArgumentParser):
    """Refuses a setting with one sentence and status 2, without the usage; takes text for text."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add a class's settings, of which those that may be text are not read as the path of a config."""
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            # otherwise `data.train: train.csv` is replaced by what the file holds
            if getattr(action, "_enable_path", False) and action._is_valid_string(""):  # type: ignore[attr-defined]
                action._enable_path = False  # type: ignore[attr-defined]
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what cannot be used and the nearest that can, and exit."""
        if not self.exit_on_error:  # a component's own parser, whose message becomes part of this one's
            super().error(message, ex)
        sys.stderr.write(f"error: {sentence(message, getattr(ex, 'subcommand_parser', None) or self)}\n")
        self.exit(2)


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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the config files before what is in them."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list | tuple):
            check_config_files(list(map(str, words)))
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Settle the number of threads, and say it: on shared cores two can be slower than one."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            if threads < 1:
                raise InputError(f"`threads`={threads} leaves no thread to compute with; use 1 or more.")
            torch.set_num_threads(threads)
        rank_zero_info(f"CPU threads: {torch.get_num_threads()}")

    def instantiate_classes(self) -> None:
        """Build the components; an `InputError` of one of them comes out as it was raised."""
        refusals: list[InputError] = []

        def instantiate(class_type: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return class_type(*args, **kwargs)
            except InputError as error:
                refusals.append(error)
                raise

        self.parser.add_instantiator(instantiate, object)
        try:
            super().instantiate_classes()
        except Exception:
            if not refusals:
                raise
            # jsonargparse has put it among the errors of the other types that the value might have had
            raise refusals[0] from None


def check_config_files(arguments: Sequence[str]) -> None:
    """Raise `InputError` for a `--config` that is not there, is not YAML or holds no settings by name."""
    files = [b for a, b in pairwise(arguments) if a in ("--config", "-c")]
    files += [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-c="))]
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            if "\n" in name or name.lstrip().startswith("{"):
                continue  # YAML on the command line itself
            there = [str(file) for file in sorted(path.parent.glob("*.y*ml"))]
            close = difflib.get_close_matches(str(path), there, n=1)
            raise InputError(
                f"`--config`={name} does not exist; "
                + (f"the nearest is {close[0]}." if close else "check its path.")
            )
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            raise InputError(f"`--config`={name} is not valid YAML{line}: {reason}.") from error
        if not isinstance(node, yaml.MappingNode):
            raise InputError(
                f"`--config`={name} holds no settings by name; write `model:`, `data:` and `trainer:` with theirs."
            )


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
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"prog": "python -m sppo_lightning"},
        args=args,
        run=run,
    )


def main(args: Any = None) -> None:
    """Run the command line; a mistake in the input ends it with one sentence and status 2."""
    try:
        command_line(args)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
