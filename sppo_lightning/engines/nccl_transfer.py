"""How the policy's weights reach vLLM servers from GPU to GPU: vLLM's weight transfer over NCCL."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppo_lightning.engines.http import JSONClient
from sppo_lightning.engines.weight_transfer import ServedFolder, WeightTransfer, served_weights
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy


class NCCLTransfer(WeightTransfer):
    """Broadcast from the trainer's first GPU, without a copy on disk: each server is a process group with it.

    The folder holds configuration and tokenizer alone, and servers start without weights. The trainer's environment
    needs vLLM too (the extra `vllm`), for its side of the transfer.

    Source: vLLM's weight transfer API, `vllm.distributed.weight_transfer`.

    Args:
        path: The folder that servers start with, as the trainer sees it.
        served_path: The same folder as the servers see it; `path` where left out.
        address: This machine as the servers reach it; they connect to a free port of it.
    """

    backend: ClassVar[str] = "nccl"  # as vLLM calls it

    def __init__(
        self, path: str = "runs/vllm/model", served_path: str | None = None, address: str = "127.0.0.1"
    ) -> None:
        if find_spec("vllm") is None:
            raise InputError(
                "`transfer`=NCCLTransfer needs vLLM in the trainer's environment, where it is not installed; use "
                "FolderTransfer, or install the extra: pip install 'sppo-lightning[vllm]'."
            )
        self.folder = ServedFolder(path, served_path)
        self.address = address
        self._ends: dict[JSONClient, Any] = {}  # the trainer's end of the transfer to each server
        self._source: Any = None  # the policy's weights, as vLLM reads them

    def prepare(self, policy: CausalLMPolicy) -> str:
        """Write the model's folder without its weights; the command that serves it."""
        with self.folder.described(policy):
            return self._command

    @property
    def _command(self) -> str:
        setting = json.dumps({"backend": self.backend})
        return f"{self.folder.command} --load-format dummy --weight-transfer-config '{setting}'"

    def send(self, policy: CausalLMPolicy, servers: Sequence[JSONClient], label: str) -> None:
        """Broadcast to one server after the other."""
        if self._source is None or self._source.policy is not policy:
            self._source = _source(policy)
        for server in servers:
            end = self._ends.pop(server, None) or self._connect(server)
            end.source = self._source
            end.send_weights()
            self._ends[server] = end  # one that has failed is of no more use
            server.post("/reset_prefix_cache")  # which holds keys and values of the weights before
            server.post("/update_weight_version", {"new_version": label})

    def _connect(self, server: JSONClient) -> Any:
        """Make the process group of the trainer and the workers of one server."""
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        config = server.get("/server_info?config_format=json")["vllm_config"]
        if (config.get("weight_transfer_config") or {}).get("backend") != self.backend:  # or both ends would wait
            raise InputError(
                f"The vLLM server at {server.url} takes no weights over NCCL; start it: {self._command}"
            )
        workers = int(server.get("/get_world_size")["world_size"])
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return WeightTransferTrainerFactory.trainer_init(
            self.init_info(port, workers + 1), client=_ControlPlane(server), source=self._source
        )

    def init_info(self, port: int, ranks: int) -> Any:
        """What vLLM makes the trainer's end of."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(self.address, port, ranks, rank=0)


class _ControlPlane:
    """vLLM's calls around a transfer, as `vllm.distributed.weight_transfer.base.VLLMWeightSyncClient` has them."""

    def __init__(self, server: JSONClient) -> None:
        self.server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.server.post("/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.server.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.post("/finish_weight_update", {"weight_version": weight_version})


def _source(policy: CausalLMPolicy) -> Any:
    """The policy's weights as vLLM reads them: their names, dtypes and shapes, and themselves, one at a time."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def __init__(self) -> None:
            self.policy = policy
            with torch.no_grad():  # shapes stay what they are, so they are looked up once
                self.described = [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in self]

        def metadata(self) -> list[ParamMeta]:
            return self.described

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            # a sharded policy's copy is in the machine's memory, and NCCL is between GPUs
            gpu = torch.cuda.is_available()
            return served_weights(policy, torch.device("cuda") if gpu else policy.device)

    return Weights()
