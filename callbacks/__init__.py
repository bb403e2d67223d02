"""The pipeline's stages and everything a user adds to it."""

from sppo_lightning.callbacks.adaptive_samples import AdaptiveSamples
from sppo_lightning.callbacks.checkpoint import Checkpoint
from sppo_lightning.callbacks.code_verifier import CodeVerifier
from sppo_lightning.callbacks.collapse_monitor import CollapseMonitor
from sppo_lightning.callbacks.completion_log import CompletionLog
from sppo_lightning.callbacks.completion_writer import CompletionWriter
from sppo_lightning.callbacks.critic_calibration import CriticCalibration
from sppo_lightning.callbacks.dynamic_sampling import DynamicSampling
from sppo_lightning.callbacks.exact_match import ExactMatch
from sppo_lightning.callbacks.format_verifier import FormatVerifier
from sppo_lightning.callbacks.hacking_monitor import HackingMonitor
from sppo_lightning.callbacks.hf_export import HFExport
from sppo_lightning.callbacks.initial_validation import InitialValidation
from sppo_lightning.callbacks.length_penalty import LengthPenalty
from sppo_lightning.callbacks.math_verifier import MathVerifier
from sppo_lightning.callbacks.memory_plan import MemoryPlan
from sppo_lightning.callbacks.policy_calibration import PolicyCalibration
from sppo_lightning.callbacks.progress import RichProgress
from sppo_lightning.callbacks.reference_refresh import ReferenceRefresh
from sppo_lightning.callbacks.reward_model_verifier import RewardModelVerifier
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.callbacks.run_summary import RunSummary
from sppo_lightning.callbacks.sample_log import SampleLog
from sppo_lightning.callbacks.sampler_parity import SamplerParity
from sppo_lightning.callbacks.search_hopeless import SearchHopeless
from sppo_lightning.callbacks.step_quality import StepQuality
from sppo_lightning.callbacks.success_replay import SuccessReplay
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.callbacks.warm_start_gate import WarmStartGate

__all__ = [
    "AdaptiveSamples",
    "Checkpoint",
    "CodeVerifier",
    "CollapseMonitor",
    "CompletionLog",
    "CompletionWriter",
    "CriticCalibration",
    "DynamicSampling",
    "ExactMatch",
    "FormatVerifier",
    "HFExport",
    "HackingMonitor",
    "InitialValidation",
    "LengthPenalty",
    "MathVerifier",
    "MemoryPlan",
    "PolicyCalibration",
    "ReferenceRefresh",
    "RewardModelVerifier",
    "RichProgress",
    "RolloutGeneration",
    "RunSummary",
    "SampleLog",
    "SamplerParity",
    "SearchHopeless",
    "StepQuality",
    "SuccessReplay",
    "Verifier",
    "WarmStartGate",
]
