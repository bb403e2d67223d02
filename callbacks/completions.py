"""A scored completion as a row of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from lightning.pytorch import Trainer

from sppo_lightning.batch import Rollouts
from sppo_lightning.callbacks.verifier import Verifier

_COLUMNS = {
    "dataset": pa.string(),
    "row": pa.int64(),
    "prompt": pa.string(),
    "response": pa.string(),
    "gold": pa.string(),
    "finish_reason": pa.string(),
    "response_tokens": pa.int64(),
    "reward": pa.float32(),
}


def completion_rows(rollouts: Rollouts) -> list[dict[str, Any]]:
    """One dict for each response; null where a verifier gave no verdict."""
    tokens = rollouts.response_mask.sum(dim=1).long().tolist()
    numbers = {"reward": rollouts.rewards.tolist()}
    numbers |= {f"score/{name}": scores.values.tolist() for name, scores in rollouts.scores.items()}
    return [
        {
            "dataset": prompt.dataset,
            "row": prompt.row,
            "prompt": well_formed(prompt.text),
            "response": well_formed(rollouts.responses[i]),
            "gold": well_formed(prompt.gold),
            "finish_reason": rollouts.finish_reasons[i],
            "response_tokens": tokens[i],
            **{name: None if math.isnan(values[i]) else values[i] for name, values in numbers.items()},
        }
        for i, prompt in enumerate(rollouts.prompts)
    ]


def completion_schema(trainer: Trainer, more: Iterable[tuple[str, pa.DataType]] = ()) -> pa.Schema:
    """The columns of `completion_rows`, those in `more`, and a score for each of the trainer's verifiers."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    verifiers = [callback.name for callback in callbacks if isinstance(callback, Verifier)]
    return pa.schema([*_COLUMNS.items(), *more, *((f"score/{name}", pa.float32()) for name in verifiers)])


def well_formed(text: str) -> str:
    """`text` as Unicode that can be written: a surrogate without its other half becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
