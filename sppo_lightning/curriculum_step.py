"""What the data's curriculum learns of an iteration, and what is logged of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sppo_lightning.batch import PromptBatch
from sppo_lightning.experience import Experience
from sppo_lightning.phases import phase
from sppo_lightning.ranks import gather_objects, rank_and_ranks

_CHUNK = 1024  # prompts that a rank tokenizes at a time, to ask the critic about them


def teach_curriculum(module: Any, experience: Experience) -> dict[str, float]:
    """Show the curriculum the outcomes of all ranks, and the critic's values where it wants them; a collective.

    Args:
        module: Whose trainer has the data, and whose critic is asked.
        experience: What this rank has learned from.

    Returns:
        Figures by metric name; none where the data has no curriculum.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    curriculum = getattr(data, "curriculum", None)
    if curriculum is None:
        return {}
    keys = [prompt.key for prompt in experience.rollouts.prompts]
    own = zip((curriculum.position[key] for key in keys), *_columns(experience), strict=True)
    # sorted, because floating point sums depend on the order, and the order of ranks on how many there are
    table = np.array(sorted(row for part in gather_objects(list(own)) for row in part)).reshape(-1, 5)
    positions, rewards, learned, squares, tokens = table[:, 0].astype(np.int64), *table[:, 1:].T
    drawn = np.unique(positions)
    figures = curriculum.describe(drawn)
    if len(drawn):
        figures["nonzero_fraction"] = len(np.unique(positions[squares > 0])) / len(drawn)
        figures["signal_per_token"] = float(squares.sum() / max(tokens.sum(), 1.0))
    curriculum.observe(positions[learned > 0], rewards[learned > 0])
    if curriculum.wants_values:
        curriculum.rescore(_values(module, data))
    figures["coverage"] = curriculum.coverage
    return {f"curriculum/{name}": value for name, value in figures.items()}


def _columns(experience: Experience) -> list[list[float]]:
    """Of each of `N` responses: R, whether it has a verdict, A² (the mean of its tokens') and its tokens."""
    squares, mask = experience.advantages.double().square(), experience.rollouts.response_mask
    if squares.ndim == 2:
        squares = (squares * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    squares = torch.where(experience.verdicts, squares, 0.0)
    columns = (experience.rewards, experience.verdicts, squares, mask.sum(1))
    return [column.double().tolist() for column in columns]


def _values(module: Any, data: Any) -> np.ndarray:
    """The critic's chance of success for every training prompt, `[P]`; the ranks share the prompts."""
    count, (rank, ranks) = len(data.curriculum.prompts), rank_and_ranks()
    mine, most = range(rank, count, ranks), -(-count // ranks)
    own: list[float] = []
    with phase(f"rescoring ({type(data.curriculum).__name__})"):
        for start in range(0, most, _CHUNK):  # as often on every rank: a sharded critic needs them all
            batch: PromptBatch = data.training_batch(mine[start : start + _CHUNK])
            own += module.prompt_values(batch).tolist()
        values = np.empty(count)
        for other, theirs in enumerate(gather_objects(own)):
            values[other::ranks] = theirs
    return values
