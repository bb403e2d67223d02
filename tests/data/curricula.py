"""Curricula bound to prompts that are nothing but their rows."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from sppo_lightning.batch import Prompt
from sppo_lightning.data import Curriculum

C = TypeVar("C", bound=Curriculum)


def prompts(columns: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    return [Prompt(str(i), "", "train", i, metadata=row) for i, row in enumerate(columns)]


def bound(curriculum: C, size: int, batch_size: int = 1, seed: int = 3, shuffle: bool = True) -> C:
    curriculum.bind(prompts([{"place": i} for i in range(size)]), batch_size, seed, shuffle)
    return curriculum


def observe(curriculum: Curriculum, *outcomes: tuple[int, float]) -> None:
    """One iteration's responses, as positions of prompts and rewards."""
    curriculum.observe(np.array([i for i, _ in outcomes], dtype=np.int64), np.array([r for _, r in outcomes]))
