"""The policy: any Hugging Face causal language model, and its log-probabilities."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sppo_lightning.batch import Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models.adapters import adapters_off
from sppo_lightning.models.loading import base_of, eager_attention
from sppo_lightning.models.log_probs import selected_log_probs, selected_log_probs_of
from sppo_lightning.models.own_head import OwnHead
from sppo_lightning.models.pretrained import PretrainedModule
from sppo_lightning.models.tensor_parallel import for_own_rows, with_the_group


class CausalLMPolicy(PretrainedModule):
    """Any Hugging Face causal language model as the policy.

    Args:
        packed: Lay the rows of a micro-batch end to end, without padding, where positions that start anew keep them
            apart; where left out, with flash attention on CUDA.
        **settings: Those of every model: see `PretrainedModule`.
    """

    setting = "model.policy"
    auto_class = AutoModelForCausalLM

    def __init__(self, *args: Any, packed: bool | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.packed = packed
        self.own_head: OwnHead | None = None  # where `head` does not say all that the model does to its logits
        self.packable = True  # whether the model keeps rows apart by their positions

    @property
    def packs(self) -> bool:
        """Whether rows are laid end to end, see `packed`; only flash attention does no more work then."""
        if self.packed is not None:
            return self.packed
        flash = "flash" in str(self.model.config._attn_implementation)
        return flash and self.packable and self.device.type == "cuda"

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of logits and log-probabilities: float32, or float64 where the weights are."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of hidden states, keys and values: autocast's where it is on, else the weights' own."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a response: the tokenizer's and the generation config's."""
        ids = self.model.generation_config.eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return sorted({*ids, self.tokenizer.eos_token_id})

    def head(self) -> dict[str, Any]:
        """The output embedding and what the model does to its logits, as `selected_log_probs` takes them."""
        config = self.model.config.get_text_config()
        embedding = self.model.get_output_embeddings()
        bias = getattr(embedding, "bias", None)
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return {
            "weight": for_own_rows(embedding.weight, self.group),
            "bias": None if bias is None else for_own_rows(bias, self.group),
            "scale": float(scale),
            "softcap": getattr(config, "final_logit_softcapping", None),
        }

    def logits(self, hidden: Tensor, head: dict[str, Any] | None = None) -> Tensor:
        """`[n, H]` hidden states to `[n, V]` logits, before the temperature; for a decoding step.

        `head` is what `self.head()` gives, for those who ask many times.
        """
        if self.own_head is not None:
            return self.own_head(hidden).to(self.logits_dtype)
        head = self.head() if head is None else head
        logits = nn.functional.linear(hidden, head["weight"], head["bias"]).to(self.logits_dtype)
        if head["scale"] != 1:  # a pass over all logits
            logits = logits * head["scale"]
        return logits if head["softcap"] is None else head["softcap"] * torch.tanh(logits / head["softcap"])

    def hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states `[N, L, H]` of the base model for its own arguments."""
        base = base_of(self.model)
        return with_the_group(lambda **joint: base(**joint).last_hidden_state, self.group, inputs)

    def as_reference(self) -> CausalLMPolicy:
        """A policy that stays what this one is before training: with LoRA this one with its adapters off."""
        if self.lora is not None:
            return AdapterFreePolicy(self)
        return copy.deepcopy(self).requires_grad_(False)

    def forward(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, both `[N, T]`, nats, zero off the mask.

        They are of the distribution that was sampled from: logits divided by `rollouts.temperature`. Rows are
        laid flush left, `prompt | response | padding`, so causal attention needs no mask, or end to end where
        `packs`; only the hidden states that predict a response token meet the output embedding.
        """
        ids, lengths, totals = flush_left(rollouts)
        row, token = rollouts.response_mask.nonzero(as_tuple=True)  # the M response tokens
        place = lengths[row] + token - 1  # of the token before, in its row
        if self.packs:
            used = torch.arange(ids.shape[1], device=ids.device) < totals[:, None]
            starts = totals.cumsum(0) - totals
            # positions that start anew tell the attention where a row ends
            positions = used.long().cumsum(1)[used] - 1
            hidden = self.hidden(input_ids=ids[used][None], position_ids=positions[None], use_cache=False)[0]
            hidden = hidden[starts[row] + place]
        else:
            hidden = self.hidden(input_ids=ids, use_cache=False)[row, place]  # of [N, L, H]
        log_probs, entropy = self._log_probs(hidden, rollouts.response_ids[row, token], rollouts.temperature)
        empty = log_probs.new_zeros(rollouts.response_mask.shape)
        return empty.index_put((row, token), log_probs), empty.index_put((row, token), entropy)

    def _log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets` `[M]` and entropies, `[M]` each, given hidden states `[M, H]`."""
        if self.own_head is None:
            return selected_log_probs(hidden, targets=targets, temperature=temperature, **self.head())
        width = len(self.model.get_output_embeddings().weight)
        return selected_log_probs_of(self.logits, hidden, targets, width=width, temperature=temperature)

    @torch.no_grad()
    def prepare_head(self, info: dict[str, Any]) -> None:
        """Compare our logits with the model's own on three tokens, for it may treat them in a way of its own.

        Where it does, its own forward computes them from here on: slower, and with more memory, but whatever it is.
        """
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.model.get_output_embeddings().weight.shape[0]
        with eager_attention(self.model):
            self._try_packing(ids)
            expected = self.model(input_ids=ids, use_cache=False).logits[0]
            outputs = base_of(self.model)(input_ids=ids, use_cache=False)
            hidden = outputs.last_hidden_state[0]
            for own_head in (None, OwnHead(self.model, type(outputs))):
                if own_head is None and hidden.shape[1] != self.head()["weight"].shape[1]:
                    continue  # something between changes the width
                self.own_head = own_head
                ours = self.logits(hidden)
                if ours.shape == expected.shape and (ours - expected).abs().max() <= 1e-2 * expected.abs().max():
                    return
        raise InputError(
            f"`{self.setting}`={self.pretrained or self.config!r}: the logits of {type(self.model).__name__} are "
            "not a function of its transformer's last hidden states, which is all that CausalLMPolicy keeps; "
            "override CausalLMPolicy.logits for it."
        )

    def _try_packing(self, ids: Tensor) -> None:
        """Set `packable`: whether `ids` `[1, n]` and the same behind them have the same hidden states."""
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(2)[None]
        try:
            both = self.hidden(input_ids=ids.repeat(1, 2), position_ids=positions, use_cache=False)[0]
        except (IndexError, RuntimeError, TypeError, ValueError):  # no positions in its forward, or not like these
            self.packable = False
        else:
            first, second = both.chunk(2)
            self.packable = torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))
        if self.packed and not self.packable:
            raise InputError(
                f"`{self.setting}.packed`=True: {type(self.model).__name__} lets rows that lie end to end see each "
                "other; leave it out."
            )


class AdapterFreePolicy(CausalLMPolicy):
    """The policy with its adapters off, in the same memory: none of its weights are registered here again."""

    policy: CausalLMPolicy

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__(policy.pretrained, policy.tokenizer_name, policy.config)
        self.__dict__.update(policy=policy, model=policy.model, tokenizer=policy.tokenizer)

    def head(self) -> dict[str, Any]:
        """The policy's: adapters leave the output embedding alone."""
        return self.policy.head()

    def logits(self, hidden: Tensor, head: dict[str, Any] | None = None) -> Tensor:
        """The policy's, of hidden states."""
        return self.policy.logits(hidden, head)

    def hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states of the base weights."""
        with adapters_off(self.model):
            return self.policy.hidden(**inputs)

    def forward(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies under the base weights, through the policy's own call."""
        with adapters_off(self.model):
            return self.policy(rollouts)


def flush_left(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as `prompt | response | padding`: ids `[N, L]`, the prompts' lengths `[N]` and the rows' `[N]`."""
    prompt_lengths = rollouts.prompt_mask.sum(1).long()
    totals = prompt_lengths + rollouts.response_mask.sum(1).long()
    both = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    first = rollouts.prompt_ids.shape[1] - prompt_lengths  # where the left padding ends
    columns = first[:, None] + torch.arange(max(totals.tolist(), default=1), device=both.device)
    return both.gather(1, columns.clamp(max=both.shape[1] - 1)), prompt_lengths, totals
