"""The rewards that both sides of `iteration.py` give: plain functions that need no package."""

from __future__ import annotations

import random


def exact_match(gold: str, response: str) -> float:
    r"""1.0 where the last `\boxed{…}` of the response holds the gold answer, else 0.0."""
    start = response.rfind(r"\boxed{")
    end = response.find("}", start)
    return float(0 <= start < end and response[start:end].removeprefix(r"\boxed{").split() == gold.split())


def coin(gold: str, response: str) -> float:
    """1.0 or 0.0 by chance, so that next to no group of responses has an advantage of zero."""
    return float(random.getrandbits(1))


REWARDS = {"exact match": exact_match, "coin": coin}
