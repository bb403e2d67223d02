"""A copy of the policy to sample from: where it is sharded, or where transformers needs a model of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sppo_lightning.engines.weight_transfer import fingerprint, served_weights
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.own_head import OwnHead


def model_like(policy: CausalLMPolicy, device: torch.device | str) -> Any:
    """A model of the policy's architecture in the compute dtype, with weights that are not yet the policy's."""
    with torch.device(device), isolate_rng():
        model = type(policy.model)._from_config(copy.deepcopy(policy.model.config), dtype=policy.compute_dtype)
    model.generation_config = policy.model.generation_config
    return model.eval().requires_grad_(False)


@torch.no_grad()
def bring_up_to_date(model: Any, policy: CausalLMPolicy) -> None:
    """Give `model` the policy's weights, one at a time, with adapters merged; a collective where it is sharded."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, weight in served_weights(policy, policy.device):
        if name in own:  # the head has a name of its own there, even where it is tied
            own[name].copy_(weight)


class WholeCopy:
    """A sharded policy's weights, all of them, in the compute dtype and with adapters merged, to sample from.

    Args:
        source: The policy that is trained.
        device: Where the copy is, the source's device where left out; on "meta" there is none, and the rank
            that has it there only helps others to bring theirs up to date.
    """

    def __init__(self, source: CausalLMPolicy, device: torch.device | str | None = None) -> None:
        self.source = source
        # the class before sharding, which puts one of its own in its place
        kind: Any = next(kind for kind in type(source).__mro__ if not issubclass(kind, FSDPModule))
        self.policy: CausalLMPolicy = kind.__new__(kind)
        nn.Module.__init__(self.policy)
        plain = {name: value for name, value in vars(source).items() if not name.startswith("_")}
        self.policy.__dict__.update(plain, lora=None, group=None)
        self.policy.model = model_like(source, device or source.device)
        if source.own_head is not None:
            self.policy.own_head = OwnHead(self.policy.model, source.own_head.outputs)
        self._followed: list[int] | None = None  # the fingerprint of the source's weights that it has

    def follow(self) -> None:
        """Take over the source's weights, unless they are the same as before; a collective."""
        weights = fingerprint(self.source)
        if weights != self._followed:
            bring_up_to_date(self.policy.model, self.source)
            self._followed = weights
