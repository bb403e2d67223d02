"""The parser of the command line: jsonargparse's, which refuses in one sentence and writes no secrets."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from sppo_lightning.cli_errors import sentence
from sppo_lightning.masking import masked, masked_text


class Parser(LightningArgumentParser):
    """Refuses a setting with one sentence and status 2, without the usage; takes text for text; keeps secrets."""

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
        refusal = sentence(message, getattr(ex, "subcommand_parser", None) or self)
        sys.stderr.write(f"error: {masked_text(refusal)}\n")
        self.exit(2)

    def dump(self, namespace: Namespace, *args: Any, **settings: Any) -> str:
        """The config as text, whoever prints or saves it, with secrets masked."""
        return super().dump(masked(namespace), *args, **settings)

    def instantiate_classes(self, cfg: Namespace, **settings: Any) -> Namespace:
        """Build the components; what one of them raises comes out as it was raised."""
        raised: list[Exception] = []

        def instantiate(class_type: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return class_type(*args, **kwargs)
            except Exception as error:
                raised.append(error)
                raise

        self.add_instantiator(instantiate, object)
        try:
            return super().instantiate_classes(cfg, **settings)
        except Exception:
            if not raised:
                raise
            # jsonargparse has put it among the errors of the other types that the value might have had
            raise raised[0] from None
