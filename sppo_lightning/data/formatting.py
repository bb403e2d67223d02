"""From a row's prompt to the text and the token ids that the policy reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

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
        return self._rendered(turns, add_generation_prompt=True), turns

    def completion(self, prompt: str, turns: Turns | None, answer: str, turn: Mapping[str, Any] | None) -> str:
        """What the policy has to write behind `prompt` to give this answer, the end of its turn included.

        A turn is written as the chat template renders it behind the generation prompt; text, and all under `plain`,
        as it stands. Where the template does not go on from its own generation prompt (some drop an earlier
        thought), the answer's text is taken, without what the generation prompt has opened already.

        Args:
            prompt: The rendered prompt.
            turns: What it was made of, as `render` gives them.
            answer: The answer's text.
            turn: The assistant's message that it is the text of, if any.

        Raises:
            RowError: Where the chat template refuses the turn.
        """
        if not self.chat:
            return answer
        if turn is not None and turns is not None:
            whole = self._rendered((*turns, turn), add_generation_prompt=False)
            if whole.startswith(prompt):
                return whole[len(prompt) :].rstrip()
            opened = prompt[len(os.path.commonprefix([prompt, whole])) :].strip()
            if opened and answer.lstrip().startswith(opened):
                answer = answer.lstrip()[len(opened) :].lstrip("\n")
        return answer + self._turn_end

    @cached_property
    def _turn_end(self) -> str:
        """The special token with which the chat template ends an assistant's turn; "" where it has none."""
        probe = "5a7c"  # no special token, nor part of one
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": probe})
        with suppress(RowError):  # a template that wants more than this
            _, found, rest = self._rendered(turns, add_generation_prompt=False).rpartition(probe)
            ids = self.tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
            added = self.tokenizer.added_tokens_decoder
            if ids and (ids[0] == self.tokenizer.eos_token_id or (ids[0] in added and added[ids[0]].special)):
                return str(self.tokenizer.convert_ids_to_tokens(ids[0]))
        return ""

    def _rendered(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        messages = [dict(turn) for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program that comes with the model
            raise RowError(f"the chat template refuses the messages ({error})") from error
        return str(text)

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
