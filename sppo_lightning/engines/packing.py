"""Ragged responses as the tensors of `Rollouts`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sppo_lightning.batch import FinishReason, PromptBatch, Rollouts
from sppo_lightning.models import CausalLMPolicy


def pack_rollouts(
    batch: PromptBatch,
    prompt_index: list[int],
    responses: list[list[int]],
    log_probs: list[list[float]],
    finish_reasons: list[FinishReason],
    *,
    policy: CausalLMPolicy,
    temperature: float,
    versions: Sequence[int],
) -> Rollouts:
    """Rollouts from ragged lists: `N` rows of response ids and log-probabilities, on the policy's device."""
    tokenizer = policy.tokenizer
    prompts = [batch.token_ids[i] for i in prompt_index]
    pad = tokenizer.pad_token_id
    prompt_ids, prompt_mask = _padded(prompts, pad, left=True)
    response_ids, response_mask = _padded(responses, pad, left=False)
    sampled = torch.zeros_like(response_mask)
    for row, values in enumerate(log_probs):
        sampled[row, : len(values)] = torch.tensor(values, dtype=sampled.dtype)
    device = policy.device
    return Rollouts(
        prompts=[batch.prompts[i] for i in prompt_index],
        prompt_index=torch.tensor(prompt_index, dtype=torch.long, device=device),
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        response_ids=response_ids.to(device),
        response_mask=response_mask.to(device),
        sampled_log_probs=sampled.to(device),
        responses=tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else [],
        finish_reasons=finish_reasons,
        temperature=temperature,
        policy_versions=torch.tensor(versions, dtype=torch.long, device=device),
    )


def _padded(rows: list[list[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[rows, longest]`, padded on the left or on the right."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    # Lightning's `bf16-true` makes bfloat16 the default, in which a sum of ones ends at 256
    mask = torch.zeros(len(rows), width, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1.0
    return ids, mask
