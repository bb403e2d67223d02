"""Rollout engines: how responses are sampled."""

from sppo_lightning.engines.engine import Engine
from sppo_lightning.engines.hf import HFEngine
from sppo_lightning.engines.process import ProcessEngine
from sppo_lightning.engines.sampling import Sampling

__all__ = ["Engine", "HFEngine", "ProcessEngine", "Sampling"]
