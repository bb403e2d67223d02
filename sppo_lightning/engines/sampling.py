"""How tokens are drawn: the settings, the noise, and one decoding step's choice."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        temperature: Logits are divided by it before the softmax, in sampling and in training alike; 0 is greedy.
        max_new_tokens: Longest response, in tokens, the end-of-sequence token included.
        samples_per_prompt: Responses per prompt (N).
        top_p: Keep the most likely tokens up to this probability mass; 1 keeps all.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        min_p: Keep the tokens at least this share as likely as the most likely one; 0 keeps all.
        stop: Strings that end a response, besides the end-of-sequence tokens; the token that completes one is
            the response's last.
    """

    temperature: float = 1.0
    max_new_tokens: int = 1024
    samples_per_prompt: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        samples = self.samples_per_prompt
        warm = 1e-4 <= self.temperature <= 1e4  # beyond, float32 has no logits left
        checks = [
            ("temperature", self.temperature, warm or self.temperature == 0, "0 (greedy), or from 1e-4 to 1e4"),
            ("max_new_tokens", self.max_new_tokens, 1 <= self.max_new_tokens <= 2**24, "from 1 to 2**24"),
            ("samples_per_prompt", samples, 1 <= samples <= 2**16, "from 1 to 2**16"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (keep all) or more"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "0 (keep all) or more, and below 1"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise InputError(f"`{name}`={value} of the sampling settings cannot be used; it must be {allowed}.")

    @property
    def truncates(self) -> bool:
        """Whether tokens are cut off, so that what is sampled from is not the policy's own distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def run_seed() -> int:
    """The run's seed, as `seed_everything` leaves it in the environment; 0 when nothing was seeded."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`run_seed` is `seed` here: for a process that samples for another one."""
    before = os.environ.get("PL_GLOBAL_SEED")
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    try:
        yield
    finally:
        os.environ.pop("PL_GLOBAL_SEED")
        if before is not None:
            os.environ["PL_GLOBAL_SEED"] = before


def request_seed(seed: int, prompt: Prompt, visit: int, sample: int) -> int:
    """128 bits that depend on the arguments and nothing else: the seed of one response."""
    key = f"{seed}|{prompt.dataset}|{prompt.row}|{visit}|{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")


def token_noise(seed: int, prompt: Prompt, visit: int, sample: int, tokens: int) -> np.ndarray:
    """`[tokens]` uniform numbers in [0, 1) that depend on the arguments and nothing else.

    One number decides one token, so a response is the same whoever else is in the batch and on whatever rank
    it is sampled.
    """
    bits = np.random.Philox(key=request_seed(seed, prompt, visit, sample))
    return np.random.Generator(bits).random(tokens, dtype=np.float32)


def request_noise(
    seed: int, batch: PromptBatch, requests: Sequence[tuple[int, int]], sampling: Sampling
) -> np.ndarray:
    """`[n, max_new_tokens]`: the noise of requests, each a prompt's row in the batch and a sample; 0 if greedy."""
    noise = np.zeros((len(requests), sampling.max_new_tokens), dtype=np.float32)
    if sampling.temperature > 0:
        for row, (i, sample) in enumerate(requests):
            noise[row] = token_noise(seed, *batch.noise_key(i, sample), sampling.max_new_tokens)
    return noise


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits `[n, V]` with the tokens outside top-k, then min-p, then top-p (nucleus), at minus infinity."""
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.min_p > 0:
        floor = logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # a token goes when the mass before it reaches top_p already, so the most likely one always stays
        outside = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse CDF.

    Args:
        logits: `[n, V]`, float32, before the temperature.
        uniforms: `[n]`, one number in [0, 1) per row; unused when greedy.
        sampling: Temperature, top-k and top-p.

    Returns:
        Token ids `[n]`, and their log-probabilities `[n]` under the distribution that was sampled from. Greedy
        choices report the log-probability at temperature 1. Where logits are NaN, so is the log-probability.
    """
    if sampling.temperature == 0:
        log_probs = logits.log_softmax(dim=-1)
        tokens = logits.argmax(dim=-1)
    else:
        if sampling.temperature != 1:  # a pass over all logits
            logits = logits / sampling.temperature
        log_probs = truncate(logits, sampling).log_softmax(dim=-1)
        cumulative = log_probs.exp().cumsum_(dim=-1)
        # scaled by the sum as rounded, and strictly below it, so no token of probability zero is ever drawn
        target = uniforms.clamp(max=1 - 1e-6) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        # the search for NaN ends behind the last token, whose log-probability is NaN too
        tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)
