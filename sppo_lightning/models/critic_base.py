"""What a run asks of a critic, whatever it reads: a classifier with one label on any causal language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models.classifiers import classifier_config
from sppo_lightning.models.loading import eager_attention, first_sentence
from sppo_lightning.models.policy import CausalLMPolicy
from sppo_lightning.models.pretrained import PretrainedModule
from sppo_lightning.models.tensor_parallel import with_the_group


class Critic(PretrainedModule, ABC):
    """Predicts rewards; what its outputs mean (a logit, a value) is for its loss to say.

    Any causal language model serves, of any size and family. A value head that `pretrained` brings along, as the
    folder of an exported critic does, goes on from where it was; else it starts at zero. Parameters are reached
    through `forward` alone, so that sharding strategies see every use.
    """

    setting = "model.critic"
    auto_class = AutoModelForSequenceClassification
    forwards = ("outputs", "prompt_outputs")  # by which it is asked, besides `forward`
    reads: ClassVar[Literal["prompt", "token"]]  # the prompt alone, or every token of the response too

    @abstractmethod
    def lengths(self, rollouts: Rollouts) -> list[int]:
        """`N` numbers of tokens that `outputs` reads."""

    @abstractmethod
    def outputs(self, rollouts: Rollouts) -> Tensor:
        """`[N]`, one per prompt; or `[N, T]`, before each response token, anything off the mask."""

    @abstractmethod
    def prompt_lengths(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[int]:
        """`B` numbers of tokens that `prompt_outputs` reads; `token_ids` are the prompts in the policy's ids."""

    @abstractmethod
    def prompt_outputs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """`[B]`, at the end of each prompt."""

    def check_policy(self, policy: CausalLMPolicy) -> None:
        """Raise `InputError` for a policy whose responses this critic cannot read."""

    def adapt_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A classifier with one label, by which an exported critic is known elsewhere."""
        return classifier_config(config, "solvable", self.tokenizer.pad_token_id)

    def check_weights(self, info: dict[str, Any]) -> None:
        """Refuse a classifier of something else, and a checkpoint that lacks weights below its head."""
        for name, found, wanted in info["mismatched_keys"]:
            if name in self.head_weights():
                raise InputError(
                    f"`{self.setting}.pretrained`={self.pretrained!r} has a head `{name}` of the shape "
                    f"{list(found)}, and a critic needs {list(wanted)}, one prediction; give a causal language "
                    "model, such as Qwen/Qwen2.5-0.5B, or an exported critic."
                )
        super().check_weights(info)

    def head_weights(self) -> set[str]:
        """Names of the weights above the base model."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[id(parameter)] for parameter in self.head.parameters()}

    def prepare_head(self, info: dict[str, Any]) -> None:
        """Check that the head can be used, and set it to zero if it is new."""
        self._check_values()
        if self.head_weights() & set(info["missing_keys"]):
            for parameter in self.value_head.parameters():
                nn.init.zeros_(parameter)
        # how the critic reads is how its folder is to be read
        self.tokenizer.padding_side, self.tokenizer.truncation_side = "right", "left"

    @property
    def head(self) -> nn.Sequential:
        """`[…, H] → […, 1]`: the value head, and what a few families have between it and the base model."""
        return nn.Sequential(*(part for part in self.model.children() if part is not self.model.base_model))

    @property
    def value_head(self) -> nn.Linear:
        """The last layer, whose output is the value logit."""
        return [layer for layer in self.head.modules() if isinstance(layer, nn.Linear)][-1]

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states `[N, L, H]` of ids `[N, L]`, padded on the right: causal attention needs no mask."""
        inputs = {"input_ids": ids, "use_cache": False}
        return with_the_group(lambda **joint: self.model.base_model(**joint).last_hidden_state, self.group, inputs)

    def values_of(self, hidden: Tensor) -> Tensor:
        """The head's outputs `[…]` of hidden states `[…, H]`, float32 or wider."""
        values = self.head(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def last_hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states `[N, H]` at the last of each row's token ids, found from the lengths, never by padding."""
        last = torch.tensor([len(row) - 1 for row in rows], dtype=torch.long, device=self.device)
        hidden = self.hidden(self.padded(rows))
        return hidden[torch.arange(len(rows), device=hidden.device), last]

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids `[N, L]`, padded on the right."""
        tensors = [torch.tensor(row) for row in rows] or [torch.zeros(0, dtype=torch.long)]
        padded = pad_sequence(tensors, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return padded[: len(rows)].to(self.device)

    @torch.no_grad()
    def _check_values(self) -> None:
        """Compare padded rows with the model's own values: it may look ahead, or take its value from elsewhere."""
        pad = self.tokenizer.pad_token_id  # which the model's own forward would not read
        size = self.model.get_input_embeddings().weight.shape[0]
        tokens = [token for token in range(min(size, 8)) if token != pad]
        rows = [tokens[:2], tokens[:4], tokens[:6]]
        name = f"`{self.setting}`={self.pretrained or self.config!r}: {type(self.model).__name__}"
        try:
            with eager_attention(self.model):
                own = [self.model(torch.tensor([row], device=self.device), use_cache=False).logits for row in rows]
                expected = torch.stack([logits.squeeze() for logits in own])
                difference = (self.values_of(self.last_hidden(rows)) - expected).abs().max()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{name} cannot read text alone as a causal model does ({first_sentence(error)}); use another "
                "family, such as Qwen/Qwen2.5-0.5B."
            ) from error
        if not difference <= 1e-2 * expected.abs().max():
            raise InputError(
                f"{name} does not take its value from the last token it has read alone, so it is no causal model; "
                "use one, such as Qwen/Qwen2.5-0.5B."
            )
