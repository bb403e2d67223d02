"""What a run asks of a critic, whatever it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sppo_lightning.batch import Prompt, Rollouts


class Critic(nn.Module, ABC):
    """Predicts rewards; what its outputs mean (a logit, a value) is for its loss to say.

    A critic's parameters are reached through its `forward` alone, so that sharding strategies see every use.
    """

    reads: ClassVar[Literal["prompt", "token"]]  # the prompt alone, or every token of the response too
    model: Any  # a transformers model, once `build` has run

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The critic's own tokenizer."""

    @abstractmethod
    def build(self) -> None:
        """Load the weights; a second call does nothing."""

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
