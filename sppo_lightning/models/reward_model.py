"""A learned reward: a sequence classifier with one label, and how it reads a prompt and a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sppo_lightning.batch import Prompt
from sppo_lightning.batching import micro_batches
from sppo_lightning.errors import InputError
from sppo_lightning.models.classifiers import register_classifier
from sppo_lightning.models.loading import LOAD_ERRORS, check_exists, first_sentence, read_tokenizer


class RewardModel:
    """Any Hugging Face sequence classifier with one label, with its own tokenizer and chat template.

    No `nn.Module`, so that no module or checkpoint takes it for a part of itself.

    Args:
        name: Folder or hub id of the model and its tokenizer.
        setting: What the configuration calls `name`, for errors.
        dtype: Of the weights and of the forward.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: There is no such model, it is not whole, or it has several labels.
    """

    def __init__(self, name: str, setting: str, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        self.name, self.setting = name, setting
        self.model = self._load(dtype, trust_remote_code)
        self.tokenizer = read_tokenizer(name, setting, trust_remote_code)
        special = {each.content for each in self.tokenizer.added_tokens_decoder.values() if each.special}
        special |= set(self.tokenizer.all_special_tokens)
        # the longest first, so that none hides in another
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def _load(self, dtype: torch.dtype, trust_remote_code: bool) -> Any:
        check_exists(self.name, self.setting)
        try:
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=trust_remote_code)
            self._check_labels(config)
            if config.model_type in CONFIG_MAPPING:
                register_classifier(config.model_type)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # what does not fit is in the info
            )
        except InputError:
            raise
        except LOAD_ERRORS as error:
            raise InputError(
                f"`{self.setting}`={self.name!r} cannot be loaded as a reward model ({first_sentence(error)}); "
                "give the folder or hub id of a sequence-classification model."
            ) from error
        random = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if random:
            raise InputError(
                f"`{self.setting}`={self.name!r} lacks the weights `{random[0]}` of {type(model).__name__}, which "
                "would be random; give a model that was trained to judge responses."
            )
        model.config.use_cache = False
        return model.eval().requires_grad_(False)

    def _check_labels(self, config: PreTrainedConfig) -> None:
        if config.num_labels != 1:
            raise InputError(
                f"`{self.setting}`={self.name!r} gives {config.num_labels} labels, not one score; give a "
                "sequence-classification model with one label."
            )

    @property
    def max_tokens(self) -> int | None:
        """The longest text that model and tokenizer are made for, in tokens; `None` where they do not say."""
        config: Any = self.model.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
        return min(known, default=None)

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Token ids of the conversation: the turns and the response as the assistant's, under the chat template.

        Without a chat template they are of the prompt's text with the response behind it. What spells a special
        token in a response is left out, because it would end the turn, or begin another.
        """
        response = self.special.sub(" ", response)
        if not self.tokenizer.chat_template:
            return self.tokenizer(prompt.text + response)["input_ids"]
        turns = prompt.messages or ({"role": "user", "content": prompt.text},)
        conversation = [*map(dict, turns), {"role": "assistant", "content": response}]
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        except TemplateError as error:
            raise InputError(
                f"The chat template of `{self.setting}`={self.name!r} refuses the turns of row {prompt.row} of "
                f"{prompt.dataset!r} ({error}); change the row, or take another model."
            ) from error
        # a chat template writes its own special tokens
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def scores(self, token_ids: Sequence[Sequence[int]], micro_batch_tokens: int) -> list[float]:
        """The score of each of N texts, which does not depend on the others.

        Args:
            token_ids: N texts, none of them empty.
            micro_batch_tokens: Token budget of one forward, padding included.
        """
        found = [0.0] * len(token_ids)
        for rows in micro_batches([len(ids) for ids in token_ids], micro_batch_tokens):
            scores = self._forward([token_ids[row] for row in rows])
            for row, score in zip(rows, scores, strict=True):
                found[row] = score
        return found

    def _forward(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The scores of texts, the longest first, in one forward."""
        config: Any = self.model.config.get_text_config()
        own, device = config.pad_token_id, self.model.device
        # transformers takes the score at the last token that is not the padding of the model's config. Where that
        # names none, the tokenizer's is often the end of sequence, whose score would be missed
        padding = _unused_id(texts, getattr(config, "vocab_size", 0)) if own is None else own
        if padding is None and len(texts) > 1:
            return [score for text in texts for score in self._forward([text])]
        shape = len(texts), len(texts[0])
        ids, mask = torch.full(shape, padding or 0), torch.zeros(shape, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        config.pad_token_id = padding
        try:
            with torch.autocast(device.type, enabled=False):
                output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        finally:
            config.pad_token_id = own
        logits = (output.logits if hasattr(output, "logits") else output[0]).float().reshape(len(texts), -1)
        if logits.shape[1] != 1:
            raise InputError(
                f"`{self.setting}`={self.name!r} gives {logits.shape[1]} numbers for a text; give a "
                "sequence-classification model with one label."
            )
        return logits[:, 0].tolist()


def _unused_id(texts: Sequence[Sequence[int]], vocabulary: int) -> int | None:
    used = set[int]().union(*texts)
    return next((each for each in range(vocabulary) if each not in used), None)
