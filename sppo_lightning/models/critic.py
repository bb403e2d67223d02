"""The critic: a model of any size and family that reads the prompt and predicts the chance of success."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models.critic_base import Critic
from sppo_lightning.models.loading import load_model, load_tokenizer, recompute_layers


class PromptCritic(Critic):
    """A critic that reads only the prompt, with its own tokenizer: `V(s_p) = sigmoid(v)` (paper, section 3).

    Any causal language model serves as the backbone, of any size and family; nothing is shared with the policy
    but the prompt's text. The value head starts at zero, so every first prediction is V = 0.5.

    Args:
        pretrained: Folder or hub id of the backbone, such as `Qwen/Qwen2.5-0.5B`.
        tokenizer: Folder or hub id of the critic's tokenizer; the backbone's own when left out.
        config: Build a backbone with random weights from these transformers config values (`model_type` among
            them) instead of loading `pretrained`; `tokenizer` must then be given.
        max_prompt_tokens: Longer prompts lose their beginning, counted in the critic's own tokens.
        attn_implementation: Attention of transformers: `sdpa`, `eager`, `flash_attention_2`.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        trust_remote_code: Run Python code that comes with the model.
    """

    reads = "prompt"

    def __init__(
        self,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        config: dict[str, Any] | None = None,
        max_prompt_tokens: int = 2048,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.tokenizer_name = tokenizer or pretrained
        self.config = config
        self.max_prompt_tokens = max_prompt_tokens
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.model: Any = None  # a transformers sequence classifier with one label, once `build` has run

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The critic's own tokenizer, loaded on first use."""
        if self.tokenizer_name is None:
            raise InputError("`model.critic` needs `pretrained`, or `config` together with `tokenizer`.")
        return load_tokenizer(self.tokenizer_name, "model.critic.tokenizer", self.trust_remote_code)

    def build(self) -> None:
        """Load the backbone and set the value head to zero; a second call does nothing."""
        if self.model is not None:
            return
        config = self.config and {"vocab_size": len(self.tokenizer), **self.config}
        self.model = load_model(
            AutoModelForSequenceClassification,
            self.pretrained,
            config,
            setting="model.critic",
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            num_labels=1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if not isinstance(getattr(self.model, "score", None), nn.Linear):
            raise InputError(
                f"`model.critic`={self.pretrained or self.config!r}: {type(self.model).__name__} has no linear "
                "value head named `score`, so it is no causal model; use one, such as Qwen/Qwen2.5-0.5B."
            )
        nn.init.zeros_(self.value_head.weight)
        if self.gradient_checkpointing:
            recompute_layers(self.model, "model.critic")

    @property
    def value_head(self) -> nn.Linear:
        """`[H] → [1]`, the value logit."""
        return self.model.score

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

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt in the critic's tokenizer: its chat template where it has one, else text."""
        rows: list[list[int]] = []
        for prompt in prompts:
            if prompt.messages is not None and self.tokenizer.chat_template:
                ids = self.tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
            else:  # a template writes its own special tokens; text gets the first one that a family may rely on
                ids = self.tokenizer(prompt.text)["input_ids"]
            rows.append(ids[-self.max_prompt_tokens :] or [self.tokenizer.eos_token_id])
        return rows

    def _render(self, prompt: Prompt) -> str:
        turns = [dict(turn) for turn in prompt.messages or ()]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(
                f"The chat template of `model.critic` refuses the messages of row {prompt.row} of "
                f"{prompt.dataset!r} ({error}); use a critic that takes them, or prompts without a system message."
            ) from error
        return str(text)

    def forward(self, prompts: Sequence[Prompt]) -> Tensor:
        """Value logits `v`, `[N]`, float32 or wider, at the last token of each prompt.

        Rows are padded on the right, so causal attention needs no mask; the last prompt token is found from
        the lengths, never by looking for padding.
        """
        rows = self.encode(prompts)
        lengths = torch.tensor([len(row) for row in rows], device=self.model.device)
        ids = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_token_id, device=self.model.device)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, device=self.model.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [N, L, H]
        last = hidden[torch.arange(len(rows), device=hidden.device), lengths - 1]
        values = self.value_head(last).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))
