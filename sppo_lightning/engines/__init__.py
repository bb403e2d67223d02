"""Rollout engines: how responses are sampled."""

from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.hf import HFEngine
from sppo_lightning.engines.sampling import Sampling

__all__ = ["Engine", "HFEngine", "Response", "Sampling"]
