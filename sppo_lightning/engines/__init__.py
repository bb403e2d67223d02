"""Rollout engines: how responses are sampled."""

from sppo_lightning.engines.best_of_n import BestOfN
from sppo_lightning.engines.engine import Engine
from sppo_lightning.engines.hf import HFEngine
from sppo_lightning.engines.nccl_transfer import NCCLTransfer
from sppo_lightning.engines.paged import PagedEngine
from sppo_lightning.engines.process import ProcessEngine
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.engines.search import SearchEngine
from sppo_lightning.engines.tree_search import TreeSearchEngine
from sppo_lightning.engines.vllm import VLLMEngine
from sppo_lightning.engines.vllm_server import VLLMServerEngine
from sppo_lightning.engines.weight_transfer import FolderTransfer

__all__ = [
    "BestOfN",
    "Engine",
    "FolderTransfer",
    "HFEngine",
    "NCCLTransfer",
    "PagedEngine",
    "ProcessEngine",
    "Sampling",
    "SearchEngine",
    "TreeSearchEngine",
    "VLLMEngine",
    "VLLMServerEngine",
]
