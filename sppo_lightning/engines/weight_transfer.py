"""How the policy's weights reach vLLM servers."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sppo_lightning.engines.http import JSONClient
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.adapters import merged_weights
from sppo_lightning.models.sharding import is_sharded, local, whole
from sppo_lightning.ranks import gather_objects


class WeightTransfer(ABC):
    """Brings weights to servers, which have nothing to do meanwhile."""

    @abstractmethod
    def prepare(self, policy: CausalLMPolicy) -> str:
        """Make what a server needs to start with; the command that starts one."""

    @abstractmethod
    def send(self, policy: CausalLMPolicy, servers: Sequence[JSONClient], label: str) -> None:
        """Let all servers sample from these weights, and call them `label` in their responses."""


class ServedFolder:
    """The folder that a server starts with.

    Args:
        path: As the trainer sees it.
        served_path: As the servers see it; `path` where left out.
    """

    def __init__(self, path: str, served_path: str | None = None) -> None:
        self.path = Path(path)
        self.served_path = served_path or str(self.path.absolute())

    @property
    def command(self) -> str:
        """What starts a server."""
        return (
            "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server "
            f"--model {self.served_path} --enable-scale-out --logprobs-mode processed_logprobs "
            "--generation-config vllm"
        )

    @contextmanager
    def described(self, policy: CausalLMPolicy) -> Iterator[None]:
        """Write all but the weights, which may be written in the context."""
        try:
            write_description(policy, self.path)
            yield
        except OSError as error:
            raise InputError(
                f"`transfer.path`={str(self.path)!r} cannot be written ({error}); give a folder that the "
                "trainer may write and the servers can read."
            ) from error


class FolderTransfer(WeightTransfer):
    """Through a folder that trainer and servers see, from which vLLM loads the weights anew.

    Args:
        path: The folder, as the trainer sees it; in memory (`/dev/shm/…`) where all are on one machine.
        served_path: The same folder as the servers see it; `path` where left out.
    """

    def __init__(self, path: str = "runs/vllm/model", served_path: str | None = None) -> None:
        self.folder = ServedFolder(path, served_path)
        self._written: list[int] | None = None  # the fingerprint of the weights in the folder

    def prepare(self, policy: CausalLMPolicy) -> str:
        """Write the model's folder; the command that serves it."""
        with self.folder.described(policy):
            self._write(policy)
        return self.folder.command

    def send(self, policy: CausalLMPolicy, servers: Sequence[JSONClient], label: str) -> None:
        """Write the weights once, and let each server load them."""
        self._write(policy)
        for server in servers:
            body = {"method": "reload_weights", "kwargs": {"weights_path": self.folder.served_path}}
            server.post("/collective_rpc", body)
            server.post("/reset_prefix_cache")  # which holds keys and values of the weights before
            server.post("/update_weight_version", {"new_version": label})

    def _write(self, policy: CausalLMPolicy) -> None:
        """Replace the file of weights in one go: a server never sees half of it."""
        weights = fingerprint(policy)
        if weights == self._written:
            return
        unfinished = self.folder.path / "model.safetensors.tmp"
        save_file(dict(served_weights(policy, "cpu", copied=True)), unfinished, metadata={"format": "pt"})
        os.replace(unfinished, self.folder.path / "model.safetensors")
        self._written = weights


@torch.no_grad()
def served_weights(
    policy: CausalLMPolicy, device: torch.device | str, *, copied: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights in the compute dtype, one at a time, with adapters merged and the head under its own name.

    A collective at each weight where the policy is sharded, and the weights are whole.

    Args:
        policy: Whose weights.
        device: Where they go.
        copied: Each in memory of its own; else one may be the policy's, or two the same.
    """
    head = policy.model.get_output_embeddings().weight
    unseen = {f"{name}.weight" for name, m in policy.model.named_modules() if getattr(m, "weight", None) is head}

    def ready(weight: Tensor) -> Tensor:
        return weight.detach().to(device, policy.compute_dtype, copy=copied).contiguous()

    for name, weight in merged_weights(policy.model, device):
        unseen.discard(name)
        yield name, ready(weight)
    for name in unseen:
        yield name, ready(whole(head))


def write_description(policy: CausalLMPolicy, folder: Path) -> None:
    """All of a model's folder but the weights: configuration and tokenizer.

    The output embedding is a weight of its own there even where the model ties it to the input embedding: vLLM
    keeps a packed copy of a tied one that does not follow.
    """
    config = copy.deepcopy(policy.model.config)
    config.tie_word_embeddings = False
    config.architectures = [type(policy.model).__name__]
    config.dtype = policy.compute_dtype
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


@torch.no_grad()
def fingerprint(policy: CausalLMPolicy) -> list[int]:
    """A number for each weight, the sum of its bits read as integers; another one when the weights have changed.

    A tensor's own count of changes would not do: the fused optimizers do not raise it. A collective where the
    policy is sharded, and the same on all ranks.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [local(weight).contiguous() for weight in policy.model.parameters()]
    sums = [part.view(integers[part.element_size()]).sum(dtype=torch.int64) for part in parts]
    numbers: list[int] = torch.stack(sums).tolist()
    return [n for rank in gather_objects(numbers) for n in rank] if is_sharded(policy) else numbers
