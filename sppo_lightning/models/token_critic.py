"""The critic of token-level PPO: it reads prompt and response, and has a value before every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models.critic_base import Critic
from sppo_lightning.models.policy import CausalLMPolicy, flush_left


class TokenCritic(Critic):
    """A critic with a value `V(s_t)` for every response token, from before it is read.

    It reads the policy's token ids, so it needs the policy's tokenizer; `pretrained` is usually the policy's own
    start. `V(s_1)`, at the prompt's end, is its view of the prompt.

    Source: PPO, arXiv 1707.06347, as language models are trained with it (arXiv 2203.02155).
    """

    reads = "token"

    def check_policy(self, policy: CausalLMPolicy) -> None:
        """Raise `InputError` for a policy with other token ids."""
        if self.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise InputError(
                f"`model.critic`={self.pretrained or self.tokenizer_name!r} reads other token ids than the policy, "
                "whose tokens TokenCritic values; use a model with the policy's tokenizer, or PromptCritic."
            )

    def lengths(self, rollouts: Rollouts) -> list[int]:
        """`N` lengths of prompt and response."""
        return rollouts.lengths

    def outputs(self, rollouts: Rollouts) -> Tensor:
        """`[N, T]`, before each response token; anything off the mask."""
        ids, prompt_lengths, _ = flush_left(rollouts)
        steps = torch.arange(rollouts.response_ids.shape[1], device=ids.device)
        before = (prompt_lengths[:, None] - 1 + steps).clamp(max=ids.shape[1] - 1)
        return self(ids).gather(1, before)

    def prompt_lengths(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> list[int]:
        """`B` prompt lengths."""
        return [len(row) for row in token_ids]

    def prompt_outputs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """`[B]`, at the end of each prompt."""
        last = torch.tensor([len(row) - 1 for row in token_ids], dtype=torch.long, device=self.device)
        return self(self.padded(token_ids)).gather(1, last[:, None]).squeeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        """Values `[N, L]` after each of the token ids `[N, L]`, padded on the right."""
        return self.values_of(self.hidden(ids))
