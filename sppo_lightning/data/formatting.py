"""From a row's prompt to the text and the token ids that the policy reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from sppo_lightning.data.layouts import RowError, Turns
from sppo_lightning.errors import InputError

Template = Literal["auto", "chat", "plain"]


class PromptFormat:
    """The template, system prompt and suffix of a run, with the policy's tokenizer.

    Args:
        tokenizer: The policy's tokenizer; it needs an end-of-sequence token.
        template: `chat` renders the tokenizer's chat template, with plain text as one user turn; `plain`
            takes the text as it is, with the contents of messages one after the other; `auto` is `chat` where
            the tokenizer has a chat template.
        system_prompt: The first turn (or paragraph, under `plain`), instead of one that a row may have.
        suffix: Appended as it stands to the last user turn, or to the text.

    Raises:
        InputError: For a tokenizer without an end-of-sequence token, and for `chat` without a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "auto",
        system_prompt: str | None = None,
        suffix: str | None = None,
    ) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"The policy's tokenizer ({name}) has no end-of-sequence token, so no response could end; "
                f"set `eos_token` in its tokenizer_config.json."
            )
        if template == "chat" and not tokenizer.chat_template:
            raise InputError(
                f"`template`=chat needs a chat template, and the policy's tokenizer ({name}) has none; "
                f"use plain, or add a chat_template.jinja to the tokenizer."
            )
        self.tokenizer = tokenizer
        self.chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.system_prompt = system_prompt
        self.suffix = suffix or ""

    def render(self, prompt: str | Turns, suffix: str | None = None) -> tuple[str, Turns | None]:
        """The text that the policy reads, and the turns it was made of (None for plain text).

        `suffix` takes the place of the run's where it is given.

        Raises:
            RowError: Where the chat template refuses the turns.
        """
        suffix = self.suffix if suffix is None else suffix
        if isinstance(prompt, str) and not self.chat:
            return "\n\n".join(filter(None, (self.system_prompt, prompt + suffix))), None
        turns = self._turns(prompt, suffix)
        if not self.chat:
            return "\n\n".join(turn["content"] for turn in turns if turn["content"]), turns
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program that comes with the model
            raise RowError(f"the chat template refuses the messages ({error})") from error
        return str(text), turns

    def _turns(self, prompt: str | Turns, suffix: str) -> Turns:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turns[last] = {"role": "user", "content": turns[last]["content"] + suffix}
        return tuple(turns)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, without padding."""
        if not texts:
            return []
        # a chat template writes its own special tokens
        token_ids = self.tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]
        if self.chat:
            return token_ids
        return [self._open_ended(ids, text) for ids, text in zip(token_ids, texts, strict=True)]

    def _open_ended(self, token_ids: list[int], text: str) -> list[int]:
        """The ids without the end of sequence that some tokenizers add, after which nothing would come."""
        eos, eos_id = str(self.tokenizer.eos_token), self.tokenizer.eos_token_id
        return token_ids[:-1] if token_ids[-1:] == [eos_id] and not text.endswith(eos) else token_ids
