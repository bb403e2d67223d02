"""Prompts: where they come from, how a row is read and formatted, which of them come when, and what yields them."""

from sppo_lightning.data.chain import ChainTask
from sppo_lightning.data.completions import CompletionSource
from sppo_lightning.data.curriculum import Curriculum, UniformSampling
from sppo_lightning.data.module import PromptDataModule
from sppo_lightning.data.solvability import PassRateCurriculum, SolvabilityCurriculum
from sppo_lightning.data.sources import PromptFile, PromptSource
from sppo_lightning.data.stages import StagedCurriculum

__all__ = [
    "ChainTask",
    "CompletionSource",
    "Curriculum",
    "PassRateCurriculum",
    "PromptDataModule",
    "PromptFile",
    "PromptSource",
    "SolvabilityCurriculum",
    "StagedCurriculum",
    "UniformSampling",
]
