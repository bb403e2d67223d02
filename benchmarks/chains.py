"""Chains of the embedded task, and what a policy makes of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.data import ChainTask
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.verification.extraction import extract_boxed


def chains(
    policy: CausalLMPolicy, count: int, split: Literal["train", "validation"] = "validation", seed: int = 7
) -> PromptBatch:
    """Chains of 2 to 10 operations; by default such as no run was trained on."""
    rows = ChainTask({"2-10": 1.0}, size=count, split=split, seed=seed).rows()
    prompts = [Prompt(str(row["prompt"]), str(row["answer"]), "chains", i) for i, row in enumerate(rows)]
    token_ids = policy.tokenizer([prompt.text for prompt in prompts])["input_ids"]
    return PromptBatch(prompts, token_ids, [0] * count)


def sample(policy: CausalLMPolicy, batch: PromptBatch, samples: int) -> tuple[Rollouts, Tensor]:
    """Responses at temperature 1, and which of them are right, `[N]`, bool."""
    engine = HFEngine()
    engine.update_weights(policy, 0)
    rollouts = engine.generate(batch, Sampling(max_new_tokens=64, samples_per_prompt=samples))
    pairs = zip(rollouts.responses, rollouts.prompts, strict=True)
    right = [(extract_boxed(text) or "").split() == prompt.gold.split() for text, prompt in pairs]
    return rollouts, torch.tensor(right)


def pass_rates(policy: CausalLMPolicy, batch: PromptBatch, samples: int) -> Tensor:
    """`[B]`: share of `samples` responses to each prompt that are right."""
    _, right = sample(policy, batch, samples)
    return right.reshape(len(batch), samples).float().mean(1)
