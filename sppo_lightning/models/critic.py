"""The critic: a model of any size and family that reads the prompt and predicts the chance of success."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models.critic_base import Critic
from sppo_lightning.models.sharding import is_sharded

CACHED_FEATURES = 65536  # of 1536 numbers each they would take 400 MB
CACHED_PROMPTS = 2048  # more than one iteration reads; of 2048 tokens each they would take some 150 MB


class PromptCritic(Critic):
    """A critic that reads only the prompt, with its own tokenizer: `V(s_p) = sigmoid(v)`.

    Any causal language model serves, of any size and family; nothing is shared with the policy but the prompt's
    text. A new value head starts at zero, so that every first prediction is V = 0.5; an exported critic as
    `pretrained` goes on from where it was.

    Source: SPPO, arXiv 2604.08865.

    Args:
        max_prompt_tokens: Longer prompts lose their beginning, counted in the critic's own tokens.
        freeze_backbone: Train the value head alone; what the backbone makes of a prompt is computed once and kept,
            unless the strategy shards the weights.
    """

    reads = "prompt"

    def __init__(
        self, *args: Any, max_prompt_tokens: int = 2048, freeze_backbone: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if max_prompt_tokens < 1:
            raise InputError(f"`max_prompt_tokens`={max_prompt_tokens} of the critic leaves none; use 1 or more.")
        self.max_prompt_tokens = max_prompt_tokens
        self.freeze_backbone = freeze_backbone
        if freeze_backbone and self.lora is not None:
            raise InputError(
                f"`{self.setting}.freeze_backbone`=True leaves its `lora` nothing to adapt; set one of the two."
            )
        self._token_ids: OrderedDict[Any, list[int]] = OrderedDict()  # by what is read, the latest last
        self._features: OrderedDict[Any, Tensor] = OrderedDict()  # [H] on the CPU, of a frozen backbone

    def build(self) -> None:
        """Load the weights, and hold the backbone still where asked to; a second call does nothing."""
        super().build()
        if self.freeze_backbone:
            self.model.base_model.requires_grad_(False)

    def lengths(self, rollouts: Rollouts) -> list[int]:
        """`N` prompt lengths in the critic's own tokens."""
        return [len(ids) for ids in self.encode(rollouts.prompts)]

    def outputs(self, rollouts: Rollouts) -> Tensor:
        """Value logits `v`, `[N]`, of the prompts; the responses are not read."""
        return self(rollouts.prompts)

    def prompt_lengths(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[int]:
        """`B` prompt lengths in the critic's own tokens."""
        return [len(ids) for ids in self.encode(prompts)]

    def prompt_outputs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Value logits `v`, `[B]`."""
        return self(prompts)

    def forward(self, prompts: Sequence[Prompt]) -> Tensor:
        """Value logits `v`, `[N]`, float32 or wider, at the last token of each prompt."""
        rows = self.encode(prompts)
        kept = self.freeze_backbone and not is_sharded(self)  # else every rank must take part in every forward
        return self.values_of(self._frozen_features(rows) if kept else self.last_hidden(rows))

    @torch.no_grad()
    def _frozen_features(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states `[N, H]` of a backbone that does not move: computed once per prompt."""
        keys = [tuple(row) for row in rows]
        new = list(dict.fromkeys(key for key in keys if key not in self._features))
        if new:
            self._features.update(zip(new, self.last_hidden(new).float().cpu(), strict=True))
        features = torch.stack([self._features[key] for key in keys])
        while len(self._features) > CACHED_FEATURES:
            self._features.popitem(last=False)
        return features.to(self.device, self.value_head.weight.dtype)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt in the critic's tokenizer: its chat template where it has one, else text.

        An iteration asks several times for the same prompts, so the ids of the latest are kept.
        """
        rows: list[list[int]] = []
        for prompt in prompts:
            turns = None if prompt.messages is None else tuple(tuple(turn.items()) for turn in prompt.messages)
            key = (prompt.text, turns)
            if key not in self._token_ids:
                self._token_ids[key] = self._tokenize(prompt)
            self._token_ids.move_to_end(key)
            rows.append(self._token_ids[key])
            if len(self._token_ids) > CACHED_PROMPTS:
                self._token_ids.popitem(last=False)
        return rows

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if prompt.messages is not None and self.tokenizer.chat_template:
            ids = self.tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
        else:  # a template writes its own special tokens; text gets the first one that a family may rely on
            ids = self.tokenizer(prompt.text)["input_ids"]
        return ids[-self.max_prompt_tokens :] or [self.tokenizer.eos_token_id]

    def _render(self, prompt: Prompt) -> str:
        turns = [dict(turn) for turn in prompt.messages or ()]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(
                f"The chat template of `{self.setting}` refuses the messages of row {prompt.row} of "
                f"{prompt.dataset!r} ({error}); use a critic that takes them, or prompts without a system message."
            ) from error
        return str(text)
