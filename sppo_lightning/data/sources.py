"""Where prompts come from: a source gives raw rows, and a layout says how to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]  # column → value, as the file gives it


class PromptSource(ABC):
    """Raw rows, and the layout they are read with.

    A subclass writes `origin` and `rows`, and sets `layout` (and `columns`) where "auto" would not do.
    """

    layout: str = "auto"  # a name from `sppo_lightning.data.layouts.LAYOUTS`, or "auto": told by the columns
    columns: Mapping[str, str] | None = None  # "prompt", "answer" or "demonstration" → the rows' own name

    @property
    @abstractmethod
    def origin(self) -> str:
        """What error messages call this source, for instance the path of its file."""

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """The rows in their order, the same at every call; a row's number is its position, from 0."""
