"""Sampling with the transformers model itself, in the trainer's process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.decode_attention import decode_attention_in
from sppo_lightning.engines.decoding import Decoder
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.engines.slots import refuse_other_caches
from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.sharding import is_sharded


class HFEngine(Engine):
    """Samples with the policy's own forward: continuous batching over a cache that grows in place.

    Prompts are prefilled in the order of their lengths, once each however many samples they get. A response that
    has finished leaves the batch at once, and waiting prompts take the rows that have become free.

    Args:
        max_rows: Most responses decoded at once, but no fewer than one prompt's samples.
        max_tokens: Most tokens that the cache may come to hold, were every response to become as long as it may;
            but no fewer than one prompt and its samples need. It bounds memory: two numbers per layer, key-value
            head and unit of the head's size for each token.
        prefill_tokens: Most tokens prefilled at once, padding included, but no fewer than one prompt's.
        cuda_graphs: Decode in few shapes, each of which is recorded as a CUDA graph: on a GPU, where a step takes
            less time than its launches. Elsewhere it only costs time.
    """

    def __init__(
        self,
        max_rows: int = 256,
        max_tokens: int = 2**20,
        prefill_tokens: int = 2**14,
        cuda_graphs: bool = False,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise InputError(f"`{name}`={value} of HFEngine leaves nothing to decode; use 1 or more.")
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.prefill_tokens = prefill_tokens
        self.cuda_graphs = cuda_graphs
        self._copy: WholeCopy | None = None  # of a sharded policy

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Keep a reference to the policy: the engine samples from the very weights that are trained.

        Where they are sharded it keeps a whole copy in the compute dtype, and this is a collective.
        """
        if policy is not self.policy:
            refuse_other_caches(policy, "HFEngine")
            self._copy = WholeCopy(policy) if is_sharded(policy) else None
        if self._copy is not None:
            self._copy.follow()
        self.policy, self.version = policy, version

    def rows(self, prompts: int, longest: int, sampling: Sampling) -> int:
        """How many responses are decoded at once, to so many prompts of up to `longest` tokens."""
        samples = sampling.samples_per_prompt
        most = self.max_tokens // (longest + sampling.max_new_tokens)
        return max(samples, min(self.max_rows, most, prompts * samples))

    @torch.no_grad()
    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """Sample responses; see `Engine.stream`."""
        if self.policy is None:
            raise RuntimeError("HFEngine.stream was called before update_weights.")
        if not len(batch):
            return
        policy = self.policy if self._copy is None else self._copy.policy
        samples = sampling.samples_per_prompt
        waiting = sorted(range(len(batch)), key=lambda i: len(batch.token_ids[i]))
        rows = self.rows(len(batch), len(batch.token_ids[waiting[-1]]), sampling)
        decoder = Decoder(policy, batch, sampling, rows, self.version, self.cuda_graphs)
        # compiled blocks would be compiled anew for each length of the cache
        with decode_attention_in(policy.model), torch.compiler.set_stance("force_eager"):
            while waiting or decoder.active is not None:
                # a prefill of a few rows takes as long as a step of many, so it waits until it is worth it
                if waiting and (decoder.active is None or decoder.free >= max(samples, rows // 8)):
                    chosen = self._prefilled_next(batch, waiting, decoder.free // samples)
                    waiting = waiting[len(chosen) :]
                    yield from decoder.admit(chosen)
                if decoder.active is not None:
                    yield from decoder.step()

    def _prefilled_next(self, batch: PromptBatch, waiting: list[int], most: int) -> list[int]:
        """The first of the waiting prompts, shortest first, that are few enough for one prefill."""
        count = 1
        while count < min(most, len(waiting)):
            if (count + 1) * len(batch.token_ids[waiting[count]]) > self.prefill_tokens:
                break
            count += 1
        return waiting[:count]
