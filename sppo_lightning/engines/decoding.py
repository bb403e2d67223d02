"""Continuous batching: sequences that are decoded side by side, each of which leaves when it has finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import or_
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sppo_lightning.batch import FinishReason, PromptBatch
from sppo_lightning.engines.attention_masks import AttentionMasks
from sppo_lightning.engines.engine import Response
from sppo_lightning.engines.fixed_steps import FixedSteps
from sppo_lightning.engines.sampling import Sampling, choose, request_noise, run_seed
from sppo_lightning.engines.slots import SlotCache
from sppo_lightning.engines.stop_strings import StopStrings
from sppo_lightning.models import CausalLMPolicy

_TENSORS = ("tokens", "newest", "log_probs", "uniforms")
_FIRST_COLUMNS = 512  # room of each sequence to begin with; more where they become longer


@dataclass
class _Rows:
    """The sequences that are decoded at present, `n` of them, in the order of the cache's rows."""

    requests: list[tuple[int, int]]  # n pairs: row of the prompt in the batch, and which of its responses
    born: list[int]  # n: steps that the decoder had made when the sequence came
    origins: list[int]  # n: position of its last prompt token, less those steps
    tokens: Tensor  # [n, max_new_tokens], int64
    newest: Tensor  # [n], int64: the last of them
    log_probs: Tensor  # [n, max_new_tokens]
    uniforms: Tensor  # [n, max_new_tokens]

    def __len__(self) -> int:
        return len(self.requests)

    def select(self, order: list[int]) -> _Rows:
        """These rows, in this order."""
        index = torch.tensor(order, dtype=torch.long, device=self.tokens.device)
        return _Rows(
            [self.requests[i] for i in order],
            [self.born[i] for i in order],
            [self.origins[i] for i in order],
            *(getattr(self, name)[index] for name in _TENSORS),
        )

    def join(self, other: _Rows) -> _Rows:
        """These rows and the other's behind them."""
        joined = (torch.cat([getattr(self, name), getattr(other, name)]) for name in _TENSORS)
        return _Rows(self.requests + other.requests, self.born + other.born, self.origins + other.origins, *joined)


class Decoder:
    """Decodes a batch's responses; requests fill the rows that finished ones leave.

    Args:
        policy: What samples.
        batch: The prompts.
        sampling: How.
        rows: Most sequences at once.
        version: Of the weights, for the responses.
        fixed_shapes: Whether steps come in few shapes, see `FixedSteps`.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        batch: PromptBatch,
        sampling: Sampling,
        rows: int,
        version: int,
        fixed_shapes: bool = False,
    ) -> None:
        self.policy, self.batch, self.sampling, self.version = policy, batch, sampling, version
        self.device = policy.device
        config = policy.model.config.get_text_config(decoder=True)
        self.masks = AttentionMasks(config)
        longest = max(map(len, batch.token_ids)) + sampling.max_new_tokens
        columns = min(longest, _FIRST_COLUMNS)
        self.cache = SlotCache(len(DynamicCache(config=config).layers), rows, columns)
        self.head, self.dtype = policy.head(), policy.compute_dtype
        self.fixed_steps = FixedSteps(self._next, self.cache) if fixed_shapes else None
        self.columns = torch.arange(0, device=self.device)
        self.eos = frozenset(policy.eos_token_ids)
        self.stop = StopStrings(policy.tokenizer, sampling.stop)
        self.seed = run_seed()
        self.steps = 0
        self.active: _Rows | None = None
        self.positions = self.places = self.columns  # see `_locate`

    @property
    def free(self) -> int:
        """Rows that requests may fill."""
        return self.cache.rows - self.cache.used

    def admit(self, chosen: Sequence[int]) -> Iterator[Response]:
        """Prefill prompts, given by their rows in the batch, and draw the first token of all their responses."""
        prompts, samples = [self.batch.token_ids[i] for i in chosen], self.sampling.samples_per_prompt
        width = max(map(len, prompts))
        pad = self.policy.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in prompts], device=self.device)
        last = torch.tensor([len(row) - 1 for row in prompts], device=self.device)
        self.cache.admit(samples)
        mask = self.masks.prefill(width, self.device, self.dtype)
        positions = torch.arange(width, device=self.device).expand_as(ids)
        hidden = self._hidden(ids, mask, positions)[torch.arange(len(ids), device=self.device), last]
        hidden = hidden.repeat_interleave(samples, 0)
        before = 0 if self.active is None else len(self.active)
        new = self._requests([(i, s) for i in chosen for s in range(samples)])
        self.cache.used += len(new)
        self.cache.width = max(self.cache.width, width)
        self.active = new if self.active is None else self.active.join(new)
        self._locate(self.active)
        drawn = choose(self.policy.logits(hidden, self.head), self._uniforms(before), self.sampling)
        yield from self._advance(*drawn, first=before)

    def step(self) -> Iterator[Response]:
        """Draw one more token of every sequence; those that have finished, which leave."""
        rows = self.active
        assert rows is not None
        self.steps += 1
        self.positions += 1
        self.places += 1
        lowest, highest = self.steps + min(rows.origins), self.steps + max(rows.origins)
        if len(self.columns) <= highest:
            self.columns = torch.arange(2 * (highest + 1), device=self.device)
        inputs = rows.newest, self.positions, self._uniforms(0), highest + 1
        if self.fixed_steps is not None:
            yield from self._advance(*self.fixed_steps(*inputs), first=0)
        else:
            yield from self._advance(*self._next(*inputs, self.columns[: highest + 1], lowest == highest), first=0)

    def _next(
        self,
        newest: Tensor,
        positions: Tensor,
        uniforms: Tensor,
        width: int,
        columns: Tensor | None = None,
        alike: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The next tokens and their log-probabilities, `[n]` each, given the newest ones and their positions."""
        columns = torch.arange(width, device=self.device) if columns is None else columns
        self.cache.decode_at(positions, width)
        mask = self.masks.decode(positions, columns, alike, self.dtype)
        hidden = self._hidden(newest[:, None], mask, positions[:, None])[:, -1]
        return choose(self.policy.logits(hidden, self.head), uniforms, self.sampling)

    def _uniforms(self, first: int) -> Tensor:
        """The noise that draws the next token of each row from `first` on."""
        assert self.active is not None
        # by one index into a flat tensor, which is several times as fast as by two
        return self.active.uniforms.view(-1).index_select(0, self.places[first:])

    def _hidden(self, ids: Tensor, mask: Any, positions: Tensor) -> Tensor:
        """Last hidden states `[n, tokens, H]` of ids `[n, tokens]`, whose keys and values are kept."""
        return self.policy.hidden(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )

    def _advance(self, token: Tensor, log_prob: Tensor, first: int) -> Iterator[Response]:
        """Take in what was drawn for the rows from `first` on; those that have finished."""
        rows = self.active
        assert rows is not None
        place = self.places[first:]
        rows.tokens.view(-1).index_copy_(0, place, token)
        rows.log_probs.view(-1).index_copy_(0, place, log_prob)
        rows.newest[first:] = token
        # the one time in a step that the host waits for the device
        stopped = [each in self.eos for each in token.tolist()]
        lengths = [self.steps - born + 1 for born in rows.born[first:]]
        if self.stop.strings:
            stopped = list(map(or_, stopped, self._stop_strings(first, lengths)))
        full = self.sampling.max_new_tokens
        finished = [i for i, length in enumerate(lengths) if stopped[i] or length == full]
        if finished:
            reasons: list[FinishReason] = ["stop" if stopped[i] else "length" for i in finished]
            yield from self._leave([first + i for i in finished], [lengths[i] for i in finished], reasons)

    def _stop_strings(self, first: int, lengths: list[int]) -> list[bool]:
        """Whether the rows from `first` on, of so many tokens, contain a stop string as of their last token."""
        rows, reach = self.active, self.stop.reach
        assert rows is not None
        tails = [row[max(0, n - reach) : n].tolist() for row, n in zip(rows.tokens[first:], lengths, strict=True)]
        return self.stop.end(tails)

    def _leave(self, finished: list[int], lengths: list[int], reasons: list[FinishReason]) -> Iterator[Response]:
        """The responses of finished rows, of so many tokens, which give up their places."""
        rows = self.active
        assert rows is not None
        tokens, log_probs = rows.tokens[finished].tolist(), rows.log_probs[finished].tolist()
        responses = [
            Response(
                *rows.requests[row],
                tokens[i][: lengths[i]],
                log_probs[i][: lengths[i]],
                reasons[i],
                self.version,
            )
            for i, row in enumerate(finished)
        ]
        order = self.cache.drop(finished)
        self.active = rows.select(order) if order else None
        if self.active is not None:
            self._locate(self.active)
        yield from responses

    def _locate(self, rows: _Rows) -> None:
        """Work out anew where each row's newest token is: in its sequence, and in `tokens` as one long vector."""
        width, steps = self.sampling.max_new_tokens, self.steps
        self.positions = torch.tensor([steps + origin for origin in rows.origins], device=self.device)
        places = [i * width + steps - born for i, born in enumerate(rows.born)]
        self.places = torch.tensor(places, device=self.device)

    def _requests(self, requests: list[tuple[int, int]]) -> _Rows:
        """Rows that have no token yet, with the noise of all they may have."""
        shape = (len(requests), self.sampling.max_new_tokens)
        noise = request_noise(self.seed, self.batch, requests, self.sampling)
        return _Rows(
            requests,
            [self.steps] * len(requests),
            [len(self.batch.token_ids[i]) - 1 - self.steps for i, _ in requests],
            torch.zeros(shape, dtype=torch.long, device=self.device),
            torch.zeros(shape[0], dtype=torch.long, device=self.device),
            torch.zeros(shape, dtype=self.policy.logits_dtype, device=self.device),
            torch.from_numpy(noise).to(self.device),
        )
