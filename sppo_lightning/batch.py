"""What flows through the pipeline: prompts in, rollouts added by the stages.

Every tensor's shape is said here and nowhere else. `B` prompts, `N` responses (`N = B × samples per prompt`),
`P` prompt tokens (left-padded), `T` response tokens (right-padded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

FinishReason = Literal["stop", "length"]
PromptKey = tuple[str, int]  # the data set's name, and the row in it


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
    def key(self) -> PromptKey:
        """What identifies it."""
        return self.dataset, self.row

    @property
    def sources(self) -> set[str]:
        """The names by which verifiers choose: of the data set, and in the row's column `data_source`."""
        source = self.metadata.get("data_source")
        return {self.dataset} if source is None else {self.dataset, str(source)}

    @property
    def question(self) -> str:
        """What makes two rows the same problem: the turns, or the text where there are none."""
        if self.messages is None:
            return self.text
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)

    def plain(self) -> dict[str, Any]:
        """The fields by name, for checkpoints."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True, eq=False)
class Success:
    """A response with full marks that was not cut off, and the density that it came by."""

    prompt: Prompt
    prompt_ids: Sequence[int]  # unpadded, in the policy's ids
    response_ids: Sequence[int]  # the end-of-sequence token included
    log_probs: Sequence[float]  # nats, one per response token, of the weights that sampled it, at their temperature
    reward: float  # R
    log_excess: float = 0.0  # nats: by how much a search raised the response's density
    iteration: int = 0  # in which it was seen last, counted from 0


@dataclass
class Scores:
    """One verifier's verdicts on the responses of a batch."""

    values: Tensor  # [N], float32; NaN where the verifier gave no verdict, or does not apply
    weight: float
    role: Literal["outcome", "shaping"]
    baseline: float = 0.0  # running mean of a shaping score before this batch, in the score's own unit
    applies: Tensor | None = None  # [N], bool; False where it does not count; None where it always does
    gated: bool = False  # whether it counts only for correct responses, and so says nothing of which are

    @property
    def counts(self) -> Tensor:
        """`[N]`, bool: the responses that this score is about."""
        return torch.ones_like(self.values, dtype=torch.bool) if self.applies is None else self.applies


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
    policy_versions: Tensor  # [N], int64: `trainer.global_step` of the weights that sampled each
    scores: dict[str, Scores] = field(default_factory=dict)  # by verifier name

    def __len__(self) -> int:
        return len(self.prompts)

    def _weighted(self, chosen: Iterable[Scores]) -> tuple[Tensor, Tensor]:
        """`[N]` each, float64: sum of `weight × (score − baseline)` over the scores that count, and of the weights.

        In float64 the sum for scores of 1 is, bit for bit, that of the weights.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.response_mask.device)
        weight = torch.zeros_like(total)
        for scores in chosen:
            centred = scores.weight * (scores.values.double() - scores.baseline)
            total = total + torch.where(scores.counts, centred, 0.0)
            weight = weight + scores.weight * scores.counts.double()
        return total, weight

    @property
    def rewards(self) -> Tensor:
        """`R`, `[N]`: weighted mean of the outcome scores that count, in [0, 1]; NaN where one gave no verdict."""
        total, weight = self._weighted(scores for scores in self.scores.values() if scores.role == "outcome")
        return (total / weight).float()  # NaN where no verifier applies

    @property
    def correct(self) -> Tensor:
        """`[N]`, bool: full marks by every outcome that is not itself given for correct responses only."""
        judges = [scores for scores in self.scores.values() if scores.role == "outcome" and not scores.gated]
        total, weight = self._weighted(judges)
        return (total == weight) & (weight > 0)

    @property
    def shaping(self) -> Tensor:
        """`[N]`: weighted sum of the centred shaping scores that count; NaN where any of them gave no verdict."""
        return self._weighted(scores for scores in self.scores.values() if scores.role == "shaping")[0].float()

    @property
    def lengths(self) -> list[int]:
        """`N` row lengths in tokens, prompt and response."""
        return (self.prompt_mask.sum(1) + self.response_mask.sum(1)).long().tolist()

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
            name: dataclasses.replace(
                scores,
                values=scores.values[picked],
                applies=None if scores.applies is None else scores.applies[picked],
            )
            for name, scores in self.scores.items()
        }
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Rollouts:
        """The same on `device`; scores are left where they are."""
        return dataclasses.replace(self, **moved(self, device))

    @classmethod
    def concat(cls, parts: Sequence[Rollouts], prompt_index: Sequence[int]) -> Rollouts:
        """The responses of `parts`, one part after the other, padded anew to a common width.

        Args:
            parts: Rollouts of any widths, sampled alike and scored by the same verifiers.
            prompt_index: `N` rows of `PromptBatch.prompts`, in the batch that the joined responses belong to;
                the parts' own indices refer to the batches that they came from.

        Raises:
            ValueError: Where parts differ in temperature or verifiers, where there are none, or
                where `prompt_index` is not one per response.
        """
        if len(prompt_index) != sum(map(len, parts)) or not parts:
            raise ValueError(f"{len(prompt_index)} prompt indices for {[len(part) for part in parts]} responses.")
        changes: dict[str, Any] = {
            entry.name: join(entry.name, [getattr(part, entry.name) for part in parts])
            for entry in dataclasses.fields(cls)
            if entry.name not in ("prompt_index", "scores")
        }
        index = torch.as_tensor(prompt_index, dtype=torch.long, device=parts[0].prompt_index.device)
        names = join("verifiers", [tuple(part.scores) for part in parts])
        changes["scores"] = {name: _join_scores(name, [part.scores[name] for part in parts]) for name in names}
        return dataclasses.replace(parts[0], prompt_index=index, **changes)


def join(name: str, values: Sequence[Any]) -> Any:
    """A field of several rollouts: tensors and lists row after row; anything else must be the same in all."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim > 1:
            width = max(value.shape[1] for value in values)
            left = name.startswith("prompt_")  # responses are padded on the right
            gaps = [width - value.shape[1] for value in values]
            values = [pad(value, (gap, 0) if left else (0, gap)) for value, gap in zip(values, gaps, strict=True)]
        return torch.cat(list(values))
    if isinstance(first, list):
        return [row for value in values for row in value]
    if any(value != first for value in values):
        raise ValueError(f"Rollouts that differ in {name} cannot be joined: {list(values)}.")
    return first


def moved(owner: Any, device: torch.device | str) -> dict[str, Any]:
    """The tensors of a dataclass on `device`, by their fields' names."""
    fields = {entry.name: getattr(owner, entry.name) for entry in dataclasses.fields(owner)}
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def _join_scores(name: str, parts: Sequence[Scores]) -> Scores:
    fields = [entry.name for entry in dataclasses.fields(Scores)]
    return Scores(**{each: join(f"{each} of {name!r}", [getattr(part, each) for part in parts]) for each in fields})


class PromptBatch:
    """The prompts of one iteration (or of one validation step) on this rank.

    No dataclass, because Lightning's precision plugins take those apart and fail on frozen ones such as `Prompt`.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        token_ids: list[list[int]],
        visits: list[int],
        first_samples: list[int] | None = None,
    ) -> None:
        self.prompts = prompts  # B; may be empty on a rank whose share of the last batch is empty
        self.token_ids = token_ids  # B unpadded prompts in the policy's tokenizer
        self.visits = visits  # B, tells a prompt's draws apart, below 0 for a spare; keys the sampling noise
        self.first_samples = first_samples or [0] * len(prompts)  # B, responses that there are already; keys it too
        self.rollouts: Rollouts | None = None  # set by RolloutGeneration
        self.extra_responses = 0  # how many of the rollouts' rows, the last ones, AdaptiveSamples has added
        self.value_logits: Tensor | None = None  # [B], `v` of a critic that reads prompts, where asked ahead
        self.greedy_rollouts: Rollouts | None = None  # one greedy response per prompt, where asked for
        self.found: list[Success] = []  # by SearchHopeless; no samples of the policy
        self.draw_upcoming: Callable[[], PromptBatch] | None = None  # draws what follows, where a loader can

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def upcoming(self) -> PromptBatch | None:
        """The batch that follows, which is drawn when it is asked for; None where a loader does not know it."""
        return None if self.draw_upcoming is None else self.draw_upcoming()

    @property
    def keys(self) -> list[tuple[str, int, int, int]]:
        """What tells each prompt's responses from all others of the run: data set, row, visit and first sample."""
        rows = zip(self.prompts, self.visits, self.first_samples, strict=True)
        return [(*prompt.key, visit, first) for prompt, visit, first in rows]

    def noise_key(self, row: int, sample: int) -> tuple[Prompt, int, int]:
        """What keys the noise of a response to the prompt in a row: prompt, visit and number among its samples."""
        return self.prompts[row], self.visits[row], self.first_samples[row] + sample

    def rows(self, index: Sequence[int]) -> PromptBatch:
        """The prompts at `index`, in that order, as a new batch to which no stage has added anything."""
        columns = (self.prompts, self.token_ids, self.visits, self.first_samples)
        return PromptBatch(*([column[i] for i in index] for column in columns))  # type: ignore[arg-type]

    def to(self, *_: Any, **__: Any) -> Self:
        """The batch itself: it holds text, and the engine puts its tensors on the right device."""
        return self
