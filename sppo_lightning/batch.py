"""What flows through the pipeline: prompts in, rollouts added by the stages.

Every tensor's shape is said here and nowhere else. `B` prompts, `N` responses (`N = B × samples per prompt`),
`P` prompt tokens (left-padded), `T` response tokens (right-padded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its gold answer, as the data module yields it and verifiers see it."""

    text: str  # what the policy reads: chat template, system prompt and suffix already applied
    gold: str  # the gold answer as the data set gives it; "" where a data set has none
    dataset: str  # the name of the data set, as in `val/<dataset>/…`
    row: int  # position in its data set, counted from 0; (dataset, row) identifies the prompt
    messages: tuple[Mapping[str, str], ...] | None = None  # turns before templating, if any
    demonstration: str | None = None  # a response to imitate; only the supervised warm start reads it
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns, for verifiers

    @property
    def question(self) -> str:
        """What makes two rows the same problem: the turns, or the text where there are none."""
        if self.messages is None:
            return self.text
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)


@dataclass
class Scores:
    """One verifier's verdicts on the responses of a batch."""

    values: Tensor  # [N], float32; NaN where the verifier gave no verdict
    weight: float
    role: Literal["outcome", "shaping"]
    baseline: float = 0.0  # running mean of a shaping score before this batch, in the score's own unit


@dataclass
class Rollouts:
    """Sampled responses; each later stage adds to them and rewrites nothing."""

    prompts: list[Prompt]  # N, the prompt of each response
    prompt_index: Tensor  # [N], int64: row of the prompt in `PromptBatch.prompts`
    prompt_ids: Tensor  # [N, P], int64, left-padded
    prompt_mask: Tensor  # [N, P], 1.0 on prompt tokens
    response_ids: Tensor  # [N, T], int64, right-padded
    response_mask: Tensor  # [N, T], 1.0 on response tokens, the end-of-sequence token included
    sampled_log_probs: Tensor  # [N, T], nats, of the distribution sampled from; zero where the mask is zero
    responses: list[str]  # N, decoded without special tokens
    finish_reasons: list[FinishReason]  # N, as the engine says it, never inferred from padding
    temperature: float  # logits are divided by it in sampling and in training alike
    policy_version: int  # `trainer.global_step` of the weights that sampled
    scores: dict[str, Scores] = field(default_factory=dict)  # by verifier name

    def __len__(self) -> int:
        return len(self.prompts)

    def _weighted(self, role: str) -> tuple[Tensor, float]:
        """Sum of `weight × (score − baseline)` over the verifiers of a role, and the sum of the weights."""
        total = torch.zeros(len(self), dtype=torch.float32, device=self.response_mask.device)
        weight = 0.0
        for scores in self.scores.values():
            if scores.role == role:
                total = total + scores.weight * (scores.values - scores.baseline)
                weight += scores.weight
        return total, weight

    @property
    def rewards(self) -> Tensor:
        """`R`, `[N]`: weighted mean of the outcome scores, in [0, 1]; NaN where one gave no verdict."""
        total, weight = self._weighted("outcome")
        return total / weight if weight else torch.full_like(total, torch.nan)

    @property
    def shaping(self) -> Tensor:
        """`[N]`: weighted sum of the centred shaping scores; NaN where any of them gave no verdict."""
        return self._weighted("shaping")[0]

    def rows(self, index: Sequence[int]) -> Rollouts:
        """The responses at `index`, in that order, as new rollouts."""
        picked = torch.as_tensor(index, dtype=torch.long, device=self.prompt_index.device)
        changes: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                changes[entry.name] = value[picked]
            elif isinstance(value, list):
                changes[entry.name] = [value[i] for i in picked.tolist()]
        changes["scores"] = {
            name: dataclasses.replace(scores, values=scores.values[picked]) for name, scores in self.scores.items()
        }
        return dataclasses.replace(self, **changes)


@dataclass
class Experience:
    """What the updates of one iteration learn from; frozen before the first of them."""

    rollouts: Rollouts
    rewards: Tensor  # [N], R in [0, 1]; 0 where there is no verdict
    advantages: Tensor  # [N]
    verdicts: Tensor  # [N], bool; False where a verifier gave no verdict, so that the row teaches nothing

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def mask(self) -> Tensor:
        """`[N, T]`: the response tokens that the policy learns from."""
        return self.rollouts.response_mask * self.verdicts[:, None]

    @property
    def lengths(self) -> list[int]:
        """`N` row lengths in tokens, prompt and response."""
        return (self.rollouts.prompt_mask.sum(1) + self.rollouts.response_mask.sum(1)).long().tolist()

    def rows(self, index: Sequence[int]) -> Experience:
        """The rows at `index`, in that order."""
        picked = torch.as_tensor(index, dtype=torch.long, device=self.rewards.device)
        return Experience(
            self.rollouts.rows(index), self.rewards[picked], self.advantages[picked], self.verdicts[picked]
        )


@dataclass
class MicroBatch(Experience):
    """The rows of one backward."""

    index: list[int]  # N, their positions in the mini-batch of this rank
    share: float  # 1 / (micro-batches of the mini-batch over all ranks)
    last: bool  # whether it is the last of its mini-batch


class PromptBatch:
    """The prompts of one iteration (or of one validation step) on this rank.

    No dataclass, because Lightning's precision plugins take those apart and fail on frozen ones such as `Prompt`.
    """

    def __init__(self, prompts: list[Prompt], token_ids: list[list[int]], visits: list[int]) -> None:
        self.prompts = prompts  # B; may be empty on a rank whose share of the last batch is empty
        self.token_ids = token_ids  # B unpadded prompts in the policy's tokenizer
        self.visits = visits  # B, how often each prompt was drawn before; part of the sampling noise's key
        self.rollouts: Rollouts | None = None  # set by RolloutGeneration
        self.greedy_rollouts: Rollouts | None = None  # one greedy response per prompt, where asked for

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, *_: Any, **__: Any) -> Self:
        """The batch itself: it holds text, and the engine puts its tensors on the right device."""
        return self
