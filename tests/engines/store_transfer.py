"""vLLM's NCCL weight transfer with its bytes through a TCP store, for machines without a GPU; a plugin of vLLM.

Everything else is vLLM's own: the calls over HTTP, both ends' lifecycle, and how weights are loaded layer by layer.
"""

from pathlib import Path
from typing import Any

import torch


def use_store() -> None:
    """Replace what needs CUDA, in the process that calls: vLLM's servers do by `installed_in`, the trainer itself."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_engine

    def join(info: Any, rank: int) -> StatelessProcessGroup:
        return StatelessProcessGroup.create(info.master_address, info.master_port, rank, info.world_size)

    def broadcast(self: Any, source: Any, meta: Any) -> None:
        for _, weight in self._checked_iter(source, meta):
            self.model_update_group.broadcast(weight.contiguous(), 0)

    def update_weights(self: Any, update_info: dict[str, Any]) -> None:
        info = self.parse_update_info(update_info)
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model.load_weights([(name, self.model_update_group.broadcast(weight, 0))])

    nccl_engine.open_trainer_endpoint = lambda info: join(info, 0)
    nccl_engine.worker_init_process_group = lambda info, parallel: join(info, info.rank_offset + parallel.rank)
    nccl_engine.NCCLTrainerWeightTransferEngine._broadcast = broadcast
    nccl_engine.NCCLWeightTransferEngine.update_weights = update_weights


def installed_in(folder: Path) -> dict[str, str]:
    """Make it a plugin of the vLLM processes that are started with these environment variables."""
    about = folder / "store_transfer-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: store_transfer\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nstore = store_transfer:use_store\n")
    return {"PYTHONPATH": f"{folder}:{Path(__file__).parent}"}
