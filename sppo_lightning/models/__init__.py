"""Policies, critics and their log-probabilities."""

from sppo_lightning.models.critic import PromptCritic
from sppo_lightning.models.critic_base import Critic
from sppo_lightning.models.policy import CausalLMPolicy
from sppo_lightning.models.tiny import TinyPolicy

__all__ = ["CausalLMPolicy", "Critic", "PromptCritic", "TinyPolicy"]
