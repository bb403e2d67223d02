"""The pipeline's stages and everything a user adds to it."""

from sppo_lightning.callbacks.hf_export import HFExport
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration

__all__ = ["HFExport", "RolloutGeneration"]
