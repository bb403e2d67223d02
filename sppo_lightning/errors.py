"""The one exception that a user is meant to read, and what most often raises it."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args


class InputError(ValueError):
    """A setting, a data row or a verifier's answer that cannot be used.

    Its text is one sentence: which setting, row or component, its value, and the way out. The command line
    prints that sentence alone and exits with status 2; everything else surfaces as a traceback.
    """


def check_option(name: str, value: str, options: Any) -> None:
    """Raise `InputError` where the setting `name` is none of the texts of `options`, a `Literal`."""
    if value not in get_args(options):
        raise InputError(f"`{name}`={value} is unknown; use {' or '.join(get_args(options))}.")


def check_settings(owner: str, *checks: tuple[str, float, bool, str]) -> None:
    """Raise `InputError` for the first wrong setting: each is a name, a value, whether it is right, and what is."""
    for name, value, right, allowed in checks:
        if not right:
            raise InputError(f"`{owner}.{name}`={value} cannot be used; it must be {allowed}.")


def check_decay(owner: Any, name: str, value: float) -> None:
    """Raise `InputError` where a setting says what share is left of something, and is no share."""
    if not 0 <= value <= 1:
        raise InputError(f"`{type(owner).__name__}.{name}`={value} is no share to keep; use 0 to 1, such as 0.9.")


def nearest(word: str, options: Collection[str]) -> str:
    """`", the nearest is …"` for the option most like `word`, or the empty string where none is like it."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f", the nearest is {close[0]}" if close else ""


def shortened(value: Any) -> str:
    """The value as text of at most 60 characters, for a sentence."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def readable_path(name: str, setting: str) -> Path:
    """`name` as a path, `~` expanded; raises `InputError` where the system does not say whether it is there."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, no right to look, or no such user
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"`{setting}`={shortened(name)} cannot be read ({reason}); check its path.") from error
    return path
