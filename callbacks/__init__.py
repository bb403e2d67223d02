"""The pipeline's stages and everything a user adds to it."""

from sppo_lightning.callbacks.completion_writer import CompletionWriter
from sppo_lightning.callbacks.exact_match import ExactMatch
from sppo_lightning.callbacks.hf_export import HFExport
from sppo_lightning.callbacks.math_verifier import MathVerifier
from sppo_lightning.callbacks.reference_refresh import ReferenceRefresh
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.callbacks.verifier import Verifier

__all__ = [
    "CompletionWriter",
    "ExactMatch",
    "HFExport",
    "MathVerifier",
    "ReferenceRefresh",
    "RolloutGeneration",
    "Verifier",
]
