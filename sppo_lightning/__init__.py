"""Sequence-Level PPO for reinforcement learning with verifiable rewards, built on Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo_lightning.module import SPPOModule
    from sppo_lightning.sft import SFTModule

__all__ = ["SFTModule", "SPPOModule"]
_MODULES = {"SPPOModule": "module", "SFTModule": "sft"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that a verifier's worker process does not load torch."""
    if name in _MODULES:
        return getattr(import_module(f"sppo_lightning.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'sppo_lightning' has no attribute {name!r}")
