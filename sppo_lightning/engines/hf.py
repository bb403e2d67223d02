"""Sampling with the transformers model itself, in the trainer's process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling, choose, run_seed, token_noise
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy


@dataclass
class _Wave:
    """Responses that are decoded together: `n` rows, of which finished ones are dropped."""

    rows: Tensor  # [n], int64: which response each row is
    mask: Tensor  # [n, P + decoded], int64: attention over left padding, prompt and response so far
    uniforms: Tensor  # [rows at the start, max_new_tokens]
    tokens: Tensor  # [rows at the start, max_new_tokens], int64
    log_probs: Tensor  # [rows at the start, max_new_tokens]


class HFEngine(Engine):
    """Samples with the policy's own forward and a dynamic cache; finished rows leave the batch.

    Prompts are padded on the left and sorted by length; each prompt is prefilled once however many samples it
    gets.

    Args:
        max_rows: Most responses decoded at once, but no fewer than one prompt's samples; a larger batch is cut
            into several.
        compact_below: Finished rows are dropped from the cache when the share of unfinished ones falls below
            this; 1.0 drops them at once, a lower value copies the cache less often.
    """

    def __init__(self, max_rows: int = 256, compact_below: float = 0.9) -> None:
        if max_rows < 1:
            raise InputError(f"`max_rows`={max_rows} of HFEngine leaves nothing to decode; use 1 or more.")
        self.max_rows = max_rows
        self.compact_below = compact_below

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Keep a reference to the policy: the engine samples from the very weights that are trained."""
        self.policy, self.version = policy, version

    @torch.no_grad()
    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """Sample responses; see `Engine.stream`."""
        if self.policy is None:
            raise RuntimeError("HFEngine.stream was called before update_weights.")
        samples = sampling.samples_per_prompt
        by_length = sorted(range(len(batch)), key=lambda i: len(batch.token_ids[i]))
        prompts_per_wave = max(1, self.max_rows // samples)
        for start in range(0, len(by_length), prompts_per_wave):
            chosen = by_length[start : start + prompts_per_wave]
            wave = self._decode(batch, chosen, sampling)
            yield from self._finished(wave, [(i, s) for i in chosen for s in range(samples)])

    def _finished(self, wave: _Wave, places: list[tuple[int, int]]) -> Iterator[Response]:
        """Each row of `wave`, cut after its end-of-sequence token; `places` are prompt and sample of the rows."""
        assert self.policy is not None
        ends = torch.isin(wave.tokens, torch.tensor(self.policy.eos_token_ids, device=wave.tokens.device))
        tokens, values, stops = wave.tokens.tolist(), wave.log_probs.tolist(), ends.any(1).tolist()
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1]).tolist()
        for row, (prompt, sample) in enumerate(places):
            ids, log_probs = tokens[row][: lengths[row]], values[row][: lengths[row]]
            yield Response(prompt, sample, ids, log_probs, "stop" if stops[row] else "length", self.version)

    def _decode(self, batch: PromptBatch, chosen: list[int], sampling: Sampling) -> _Wave:
        """Decode all samples of the prompts `chosen`, until every row has stopped or reached the limit."""
        assert self.policy is not None
        device = self.policy.device
        eos = torch.tensor(self.policy.eos_token_ids, device=device)
        cache = DynamicCache(config=self.policy.model.config)
        wave, hidden = self._prefill(batch, chosen, sampling, cache)
        unfinished = torch.ones(len(wave.rows), dtype=torch.bool, device=device)
        token = wave.rows  # replaced by the first step's choice before it is read
        for step in range(sampling.max_new_tokens):
            if step:
                hidden = self.policy.hidden(
                    input_ids=token[:, None],
                    attention_mask=wave.mask,
                    position_ids=wave.mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )[:, -1]
            token, log_prob = choose(self.policy.logits(hidden), wave.uniforms[wave.rows, step], sampling)
            wave.tokens[wave.rows, step] = token
            wave.log_probs[wave.rows, step] = log_prob
            unfinished &= ~torch.isin(token, eos)
            left = int(unfinished.sum())
            if left == 0:
                break
            if left < self.compact_below * len(wave.rows):
                keep = unfinished.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                wave.rows, wave.mask, token = wave.rows[keep], wave.mask[keep], token[keep]
                unfinished = unfinished[keep]
            wave.mask = torch.cat([wave.mask, wave.mask.new_ones(len(wave.rows), 1)], dim=1)
        return wave

    def _prefill(self, batch, chosen, sampling, cache) -> tuple[_Wave, Tensor]:
        """Run the prompts once, copy the cache for further samples; the wave and its last hidden states."""
        assert self.policy is not None
        device, samples = self.policy.device, sampling.samples_per_prompt
        width = max(len(batch.token_ids[i]) for i in chosen)
        pad = self.policy.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in (batch.token_ids[i] for i in chosen)])
        lengths = torch.tensor([len(batch.token_ids[i]) for i in chosen])
        mask = (torch.arange(width) >= width - lengths[:, None]).long().to(device)
        hidden = self.policy.hidden(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )[:, -1]
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            hidden, mask = hidden.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        shape = (len(chosen) * samples, sampling.max_new_tokens)
        noise = np.zeros(shape, dtype=np.float32)
        if sampling.temperature > 0:
            seed = run_seed()
            keys = [(i, s) for i in chosen for s in range(samples)]
            for row, (i, s) in enumerate(keys):
                noise[row] = token_noise(seed, batch.prompts[i], batch.visits[i], s, shape[1])
        wave = _Wave(
            rows=torch.arange(shape[0], device=device),
            mask=mask,
            uniforms=torch.from_numpy(noise).to(device),
            tokens=torch.full(shape, -1, dtype=torch.long, device=device),
            log_probs=torch.zeros(shape, dtype=self.policy.logits_dtype, device=device),
        )
        return wave, hidden
