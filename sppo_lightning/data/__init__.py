"""Prompts: where they come from, how a row is read and formatted, and the data module that yields them."""

from sppo_lightning.data.sources import PromptSource

__all__ = ["PromptSource"]
