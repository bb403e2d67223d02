"""Strings that end a response, found in its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Says after which token a response contains a stop string, by the text that the policy's tokenizer gives it.

    Args:
        tokenizer: The policy's.
        strings: None of them empty; there may be none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        # a token has a character at least, and one more keeps a space that decoding drops at the beginning
        self.reach = max(map(len, self.strings), default=-1) + 1  # tokens

    def end(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each response contains a string as of its last token; the last `reach` tokens are enough."""
        tails = [list(response[-self.reach :]) for response in responses]
        return [self._among(text) for text in self.tokenizer.batch_decode(tails, skip_special_tokens=True)]

    def cut(self, response: list[int]) -> int | None:
        """The number of tokens up to the first string's last one; None where there is no string."""
        [text] = self.tokenizer.batch_decode([response], skip_special_tokens=True)
        if not self._among(text):
            return None
        ends = self.end([response[:length] for length in range(1, len(response) + 1)])
        return ends.index(True) + 1 if True in ends else None

    def _among(self, text: str) -> bool:
        return any(string in text for string in self.strings)
