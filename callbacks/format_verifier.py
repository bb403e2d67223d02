"""A verifier for the form of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Role, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.verification.formats import ResponseFormat, is_opened


class FormatVerifier(Verifier):
    r"""Scores 1.0 where a response has the whole of the form asked for, else 0.0.

    All or nothing, so that no part of the form pays where another is given up for it. Patterns are searched for
    in the whole response, with the syntax and flags of the package `regex`, which understands that of `re`:
    `\A` and `\Z` are its ends, `(?s)` lets a dot be a line break.

    Args:
        require: Regular expressions that must each match, such as `\\boxed\{.+\}\s*\Z`.
        forbid: Regular expressions of which none may match.
        think: A response must begin with exactly one `<think>…</think>` that is not empty, with an answer behind
            it. Where the chat template ends the prompt with `<think>`, it starts inside that block. The tags must
            be text: responses come without a tokenizer's special tokens.
        timeout_seconds: Time that the patterns may take on one response. A response on which they take longer
            scores 0.0, and is counted in `verifier/<name>/timeouts`.
        role: "shaping" or "outcome", see `Verifier`.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(
        self,
        require: Sequence[str] = (),
        forbid: Sequence[str] = (),
        think: bool = False,
        timeout_seconds: float = 0.2,
        role: Role = "shaping",
        **settings: Any,
    ) -> None:
        super().__init__(role=role, **settings)
        for setting, patterns in (("require", require), ("forbid", forbid)):
            if isinstance(patterns, str):
                raise InputError(f"`FormatVerifier.{setting}`={patterns!r} is no list; use [{patterns!r}].")
        if not (require or forbid or think):
            raise InputError("`FormatVerifier` asks for nothing; set `require`, `forbid` or `think`.")
        if not timeout_seconds > 0:
            raise InputError(f"`FormatVerifier.timeout_seconds`={timeout_seconds} is no time; use 0.2.")
        try:
            self.form = ResponseFormat(require, forbid, think)
        except ValueError as error:
            setting, pattern, why = error.args
            raise InputError(
                f"`FormatVerifier.{setting}`={pattern!r} is no regular expression ({why}); correct it, or put "
                "a backslash before what is meant as it stands."
            ) from error
        self.timeout_seconds = timeout_seconds

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """1.0 or 0.0."""
        found = [
            self.form.check(response, is_opened(prompt.text), self.timeout_seconds)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self.counts["timeouts"] += found.count("timeout")
        return [float(status == "met") for status in found]
