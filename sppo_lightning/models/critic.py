"""The critic: a model of any size and family that reads the prompt and predicts the chance of success."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.models.classifiers import classifier_config
from sppo_lightning.models.loading import eager_attention, first_sentence
from sppo_lightning.models.pretrained import PretrainedModule

CACHED_PROMPTS = 2048  # more than one iteration reads; of 2048 tokens each they would take some 150 MB


class PromptCritic(PretrainedModule):
    """A critic that reads only the prompt, with its own tokenizer: `V(s_p) = sigmoid(v)`.

    Any causal language model serves, of any size and family; nothing is shared with the policy but the prompt's
    text. A value head that `pretrained` brings along, as the folder of an exported critic does, goes on from
    where it was; else it starts at zero, so that every first prediction is V = 0.5.

    Source: SPPO, arXiv 2604.08865.

    Args:
        max_prompt_tokens: Longer prompts lose their beginning, counted in the critic's own tokens.
    """

    setting = "model.critic"
    auto_class = AutoModelForSequenceClassification

    def __init__(self, *args: Any, max_prompt_tokens: int = 2048, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_prompt_tokens = max_prompt_tokens
        self._token_ids: OrderedDict[Any, list[int]] = OrderedDict()  # by what is read, the latest last

    def adapt_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A classifier with one label, by which an exported critic is known elsewhere."""
        return classifier_config(config, "solvable", self.tokenizer.pad_token_id)

    def check_weights(self, info: dict[str, Any]) -> None:
        """Refuse a classifier of something else, and a checkpoint that lacks weights below its head."""
        labels = [found for name, found, _ in info["mismatched_keys"] if name in self.head_weights()]
        if labels:
            raise InputError(
                f"`{self.setting}.pretrained`={self.pretrained!r} is a classifier of {labels[0][0]} labels, and a "
                "critic predicts one; give a causal language model, such as Qwen/Qwen2.5-0.5B, or an exported "
                "critic."
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

    def forward(self, prompts: Sequence[Prompt]) -> Tensor:
        """Value logits `v`, `[N]`, float32 or wider, at the last token of each prompt."""
        return self._values(self.encode(prompts))

    def _values(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Value logits `[N]` at the last of each row's token ids.

        Rows are padded on the right, so causal attention needs no mask; the last prompt token is found from
        the lengths, never by looking for padding.
        """
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        padded = pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        hidden = self.model.base_model(input_ids=padded.to(self.device), use_cache=False).last_hidden_state
        values = self.head(hidden[torch.arange(len(rows), device=hidden.device), last]).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

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
                difference = (self._values(rows) - expected).abs().max()
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
