"""Prompts: where they come from, how a row is read and formatted, and the data module that yields them."""

from sppo_lightning.data.chain import ChainTask
from sppo_lightning.data.completions import CompletionSource
from sppo_lightning.data.module import PromptDataModule
from sppo_lightning.data.sources import PromptFile, PromptSource

__all__ = ["ChainTask", "CompletionSource", "PromptDataModule", "PromptFile", "PromptSource"]
