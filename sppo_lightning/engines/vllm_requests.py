"""What is asked of vLLM, and what is made of its answers, wherever it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Response
from sppo_lightning.engines.sampling import Sampling, request_seed
from sppo_lightning.engines.stop_strings import StopStrings


def request_settings(sampling: Sampling, end_of_sequence: Sequence[int]) -> dict[str, Any]:
    """The settings of a request by vLLM's names, but for its seed."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(end_of_sequence),
        "logprobs": 0,  # of the tokens drawn alone
    }


def seed_of(seed: int, batch: PromptBatch, place: tuple[int, int]) -> int:
    """The seed of a response, given by its prompt's row and its sample: 63 bits, which is what vLLM takes."""
    return request_seed(seed, *batch.noise_key(*place)) % 2**63


def check_answer(who: str, token_ids: Sequence[int], log_probs: Sequence[float], reason: Any) -> None:
    """Raise for an answer that is not whole."""
    if len(token_ids) != len(log_probs) or not token_ids or not all(map(math.isfinite, log_probs)):
        raise RuntimeError(f"{who} gives {len(token_ids)} tokens and log-probabilities {list(log_probs[:5])} …")
    if reason not in ("stop", "length"):
        raise RuntimeError(f"{who} ended a response for the reason {reason!r}, which is none of its own.")


def cut_at_stop(response: Response, stop: StopStrings) -> Response:
    """The response up to its first stop string: vLLM's text of it may differ from the tokenizer's, and miss one."""
    length = stop.cut(response.token_ids)
    if length is None or response.finish_reason == "stop" and length == len(response.token_ids):
        return response
    return replace(
        response,
        token_ids=response.token_ids[:length],
        log_probs=response.log_probs[:length],
        finish_reason="stop",
    )
