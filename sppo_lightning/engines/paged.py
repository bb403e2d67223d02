"""Sampling with transformers' continuous batching over a paged cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from sppo_lightning.batch import FinishReason, PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling, choose, request_noise, run_seed
from sppo_lightning.engines.slots import refuse_other_caches
from sppo_lightning.engines.stop_strings import StopStrings
from sppo_lightning.engines.whole_copy import bring_up_to_date, model_like
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.loading import first_sentence


class PagedEngine(Engine):
    """Samples with transformers' continuous batching, from a copy of the policy in the compute dtype.

    For CUDA with flash attention, where it decodes with CUDA graphs and reads no more of the cache than each row
    has filled. Without flash attention every row looks at all others' keys behind a mask, and `HFEngine` is the
    faster one by far. The cache lives while responses are sampled, and no longer. Samples of one prompt share those
    whole pages of it that are filled when they begin.

    Args:
        max_rows: Most responses decoded at once.
        max_tokens: Most tokens that the cache holds, but no fewer than one response needs.
        prefill_tokens: Most tokens in one forward.
        page_size: Tokens in a page of the cache; flash attention needs a multiple of 256.
    """

    def __init__(
        self, max_rows: int = 256, max_tokens: int = 2**20, prefill_tokens: int = 2**13, page_size: int = 256
    ) -> None:
        settings = {"max_rows": max_rows, "max_tokens": max_tokens, "prefill_tokens": prefill_tokens}
        for name, value in settings.items():
            if value < 1:
                raise InputError(f"`{name}`={value} of PagedEngine leaves nothing to decode; use 1 or more.")
        if page_size < 4:
            raise InputError(f"`page_size`={page_size} of PagedEngine is too small; use 4 or more.")
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.prefill_tokens, self.page_size = prefill_tokens, page_size
        self._model: Any = None  # the copy
        self._proven = False  # whether it has given a response

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Copy the weights, with adapters merged; a collective where they are sharded."""
        if policy is not self.policy or self._model is None:
            refuse_other_caches(policy, "PagedEngine")
            self._model, self._proven = model_like(policy, policy.device), False
        bring_up_to_date(self._model, policy)
        self.policy, self.version = policy, version

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """The responses as they finish; see `Engine.stream`."""
        if self.policy is None:
            raise RuntimeError("PagedEngine.stream was called before update_weights.")
        if self._model is None:  # closed
            self.update_weights(self.policy, self.version)
        if not len(batch):
            return
        # sample by sample, so that a prompt's pages are there when its next sample begins
        requests = [(i, s) for s in range(sampling.samples_per_prompt) for i in range(len(batch))]
        drawing = _Drawing(batch, requests, sampling, self.policy)
        stop = StopStrings(self.policy.tokenizer, sampling.stop)
        try:
            with self._running(batch, sampling, drawing) as manager:
                for row, (i, _) in enumerate(requests):
                    manager.add_request(batch.token_ids[i], str(row), streaming=bool(stop.strings), row=row)
                for response in self._responses(manager, drawing, stop):
                    self._proven = True
                    yield response
        except (RuntimeError, ValueError) as error:
            if self._proven:
                raise
            raise InputError(  # which architectures it can do is written nowhere
                f"`engine`=PagedEngine does not work with {type(self._model).__name__} ({first_sentence(error)}); "
                "use sppo_lightning.engines.HFEngine."
            ) from error

    def _responses(
        self, manager: ContinuousBatchingManager, drawing: _Drawing, stop: StopStrings
    ) -> Iterator[Response]:
        """What the manager gives, until all requests are answered; those that a stop string ends are called off."""
        open_rows = set(range(len(drawing.requests)))
        while open_rows:
            output = manager.get_result(timeout=1.0)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has ended before all responses had.")
                continue
            row, ids = int(output.request_id), output.generated_tokens
            if output.error:
                raise RuntimeError(f"transformers' continuous batching: {output.error}")
            if row not in open_rows:
                continue
            ended = ids[-1] in drawing.eos or bool(stop.strings) and stop.end([ids[-stop.reach :]])[0]
            if not ended and not output.is_finished():
                continue
            if not output.is_finished():
                manager.cancel_request(output.request_id)
            open_rows.discard(row)
            log_probs = drawing.log_probs_of(row, len(ids))
            reason: FinishReason = "stop" if ended else "length"
            yield Response(*drawing.requests[row], ids, log_probs, reason, self.version)

    @contextmanager
    def _running(
        self, batch: PromptBatch, sampling: Sampling, drawing: _Drawing
    ) -> Iterator[ContinuousBatchingManager]:
        """Transformers' manager at work; afterwards its cache and its thread are gone."""
        longest = max(map(len, batch.token_ids))
        pages = -(-(longest + sampling.max_new_tokens) // self.page_size)
        rows = max(1, min(self.max_rows, self.max_tokens // (pages * self.page_size), len(drawing.requests)))
        named = "page_size" if "page_size" in vars(ContinuousBatchingConfig()) else "block_size"  # until 5.18
        config = ContinuousBatchingConfig(
            **{named: self.page_size},  # type: ignore[arg-type]
            num_blocks=rows * pages,
            max_batch_tokens=max(self.prefill_tokens, rows),
            max_requests_per_batch=rows,
        )
        hints = WorkloadHints(longest, sampling.max_new_tokens, rows)
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=list(drawing.eos)
        )
        with isolate_rng():  # it seeds torch anew
            manager = ContinuousBatchingManager(self._model, generation, config, hints)
            manager.logit_processor = drawing.as_processors()
            manager.warmup()
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()

    def close(self) -> None:
        """Give the copy's memory back."""
        self._model = None


class _Drawing(ContinuousBatchingLogitsProcessor):
    """Draws the tokens: what it hands on leaves transformers no choice.

    Each token has a place in two tables on the device, row by row: of the noise that decides it, and of its
    log-probability. Place 0 is for the padding of a CUDA graph.
    """

    supported_kwargs = {"row": int}
    ignored_kwargs = ()

    def __init__(
        self, batch: PromptBatch, requests: list[tuple[int, int]], sampling: Sampling, policy: CausalLMPolicy
    ) -> None:
        self.requests, self.sampling, self.width = requests, sampling, sampling.max_new_tokens
        self.prompt_lengths = [len(batch.token_ids[i]) for i, _ in requests]
        self.eos = frozenset(policy.eos_token_ids)
        noise = request_noise(run_seed(), batch, requests, sampling)
        self.uniforms = torch.from_numpy(np.append(np.float32(0), noise)).to(policy.device)
        self.log_probs = torch.zeros(len(self.uniforms), device=policy.device)

    def as_processors(self) -> ContinuousBatchingLogitsProcessorList:
        """Itself, as transformers takes it."""
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self]))
        processors.tensors_required = 1
        return processors

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Place 0."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """The places of the tokens that the next forward will draw."""
        return torch.tensor([self._place(request.state) for request in requests_with_new_token], dtype=torch.int32)

    def _place(self, state: Any) -> int:
        row = state.logit_processor_kwargs.get("row")  # None where transformers tries its graphs out
        if row is None:
            return 0
        return 1 + row * self.width + state.position_offset - self.prompt_lengths[row]

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits `[n, V]` to logits that are finite at one token of each row."""
        places = tensor_arg[: len(scores)].long()
        tokens, log_probs = choose(scores, self.uniforms[places], self.sampling)
        self.log_probs[places] = log_probs
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def log_probs_of(self, row: int, tokens: int) -> list[float]:
        """Those of a response's tokens."""
        first = 1 + row * self.width
        return self.log_probs[first : first + tokens].tolist()
