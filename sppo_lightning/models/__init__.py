"""Policies, critics and their log-probabilities."""

from sppo_lightning.models.adapters import LoRA
from sppo_lightning.models.critic import PromptCritic
from sppo_lightning.models.critic_base import Critic
from sppo_lightning.models.policy import CausalLMPolicy
from sppo_lightning.models.tiny import CharacterCritic, TinyPolicy
from sppo_lightning.models.token_critic import TokenCritic

__all__ = [
    "CausalLMPolicy",
    "CharacterCritic",
    "Critic",
    "LoRA",
    "PromptCritic",
    "TinyPolicy",
    "TokenCritic",
]
