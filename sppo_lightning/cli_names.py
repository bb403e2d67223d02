"""The names that a config may use, settings of parsers and classes, and the classes: the nearest to a typo."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection
from importlib import import_module

from jsonargparse import ArgumentParser

# where to look for a class by its name, beside the module that was written
_PACKAGES = (
    "sppo_lightning",
    *(f"sppo_lightning.{name}" for name in ("advantages", "callbacks", "data", "engines", "models", "objectives")),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "strategies")),
)
_NO_SETTING = re.compile(r"(^|\.)(help|==SUPPRESS==)$")


def settings_of(class_path: str) -> list[str]:
    """The settings of a class as jsonargparse sees them, dotted for those of a nested group."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
    return _settings(parser)


def options_of(parser: ArgumentParser) -> list[str]:
    """The settings of a command's parser that a config may hold, dotted for those of a group."""
    return [name for name in _settings(parser) if name not in ("config", "print_config")]


def _settings(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if not _NO_SETTING.search(action.dest)]


def nearest_setting(name: str, known: Collection[str], few: int = 12) -> str:
    """The way out where `name` is none of the settings `known`: the nearest, or all where there are few."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"the nearest is `{close[0]}`"
    if 0 < len(known) <= few:
        return f"there {'are' if len(known) > 1 else 'is'} {', '.join(f'`{name}`' for name in known)}"
    return "see --help for what there is"


def nearest_class(class_path: str, base: str | None) -> str | None:
    """The full path of the class most like `class_path`, among the subclasses of `base` where one is given."""
    module, _, name = class_path.rpartition(".")
    known: dict[str, str] = {}
    for package in dict.fromkeys((module, *_PACKAGES)):
        try:
            loaded = import_module(package)
        except Exception:  # whatever a module that somebody named raises
            continue
        for entry in getattr(loaded, "__all__", vars(loaded)):
            found = getattr(loaded, entry, None)
            if inspect.isclass(found) and not inspect.isabstract(found) and not entry.startswith("_"):
                own = found.__module__.startswith(package) or hasattr(loaded, "__all__")
                if own and (base is None or base in [parent.__name__ for parent in found.__mro__[1:]]):
                    known.setdefault(entry, f"{package}.{entry}")
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0 if base else 0.6)
    return known[close[0]] if close else None
