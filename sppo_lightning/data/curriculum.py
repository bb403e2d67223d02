"""Which prompts an iteration trains on: what all curricula share, and the one that treats prompts alike.

`P` prompts in the data set, `N` responses of an iteration over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError

_MANY_BATCHES = 2**32  # more than an epoch has


class Curriculum(ABC):
    """Draws the prompts of each batch, and may learn from what becomes of them.

    Every rank has its own copy. They decide alike, because each is told the outcomes of all ranks, and a draw
    depends on the seed, on which batch it is, and on what was learned before. A subclass lists in `remembered` the
    attributes, numbers and arrays, that a resumed run needs.
    """

    adapts: ClassVar[bool] = True  # whether draws depend on outcomes
    remembered: ClassVar[tuple[str, ...]] = ("iteration", "last_seen")

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """Start anew on `P` prompts, in batches of `batch_size` over all ranks.

        Raises:
            InputError: Where it cannot draw from them, or not without `shuffle`.
        """
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self.position = {prompt.key: i for i, prompt in enumerate(prompts)}
        self.iteration = 0  # the present one, counted from 0
        self.last_seen = np.full(len(prompts), -1)  # [P], int64, the iteration of its last outcome; -1 without one

    def check_module(self, module: Any) -> None:
        """Raise `InputError` for a module that it cannot learn from."""
        if self.adapts and "scores" not in getattr(module, "needs_in_fit", ()):
            raise InputError(
                f"`data.curriculum`={type(self).__name__} learns from rewards, which {type(module).__name__} has "
                "none of; leave it out."
            )

    @abstractmethod
    def draw(self, count: int, epoch: int, batch: int) -> list[int]:
        """`count` different positions among the prompts, for the epoch's `batch`-th batch, both counted from 0."""

    def visit(self, epoch: int, batch: int) -> int:
        """What tells a prompt's place in this batch from those that it has in others, 0 or more."""
        return epoch * _MANY_BATCHES + batch

    def observe(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        """Learn from an iteration of all ranks: `[N]` positions of prompts, and R of the responses to them."""
        self.last_seen[positions] = self.iteration
        self.iteration += 1

    @property
    def wants_values(self) -> bool:
        """Whether the critic's view of all prompts is wanted before the next draw; asked after `observe`."""
        return False

    def rescore(self, values: np.ndarray) -> None:
        """Take the critic's chances of success, `[P]`, which were wanted."""
        raise NotImplementedError(f"{type(self).__name__} wants values and must define rescore().")

    def describe(self, positions: np.ndarray) -> dict[str, float]:
        """What to log of prompts that were drawn, by what was known of them then; keys without `curriculum/`."""
        return {}

    @property
    def coverage(self) -> float:
        """The share of the prompts that have had an outcome."""
        return float((self.last_seen >= 0).mean())

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, and of how many prompts it is, in types that load without the right to run code."""
        kept = {name: getattr(self, name) for name in self.remembered}
        kept = {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in kept.items()}
        return {"curriculum": type(self).__name__, "prompts": len(self.prompts), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved; start anew where it is of another curriculum or of other data."""
        then, now = (state_dict["curriculum"], state_dict["prompts"]), (type(self).__name__, len(self.prompts))
        if then != now:
            rank_zero_warn(f"{now[0]} on {now[1]} prompts starts anew: the checkpoint's is {then[0]} on {then[1]}.")
            return
        for name in self.remembered:
            value = state_dict[name]
            setattr(self, name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)


class UniformSampling(Curriculum):
    """Every prompt once per epoch, in an order of the epoch's own, or in the file's order with `shuffle: false`."""

    adapts = False
    _ordered: tuple[int, list[int]] = -1, []  # an epoch and its order

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """See `Curriculum`."""
        super().bind(prompts, batch_size, seed, shuffle)
        self._ordered = -1, []

    def draw(self, count: int, epoch: int, batch: int) -> list[int]:
        """A slice of the epoch's order, which is a function of the seed and the epoch alone."""
        if self._ordered[0] != epoch:
            self._ordered = epoch, self._order(epoch)
        return self._ordered[1][batch * count : (batch + 1) * count]

    def visit(self, epoch: int, batch: int) -> int:
        """The epoch: how often a prompt was drawn before."""
        return epoch

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)).tolist()


class WeightedCurriculum(Curriculum):
    """Draws one prompt after the other, without replacement, by its probability among those that are left."""

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """See `Curriculum`."""
        if not shuffle:
            raise InputError(
                f"`data.curriculum`={type(self).__name__} draws prompts at random, which `shuffle: false` and "
                "`trainer.overfit_batches` rule out; leave these out, or the curriculum."
            )
        super().bind(prompts, batch_size, seed, shuffle)

    @abstractmethod
    def probabilities(self) -> np.ndarray:
        """`[P]`, float64, of sum 1: the chance of each prompt to be the first of a batch."""

    def draw(self, count: int, epoch: int, batch: int) -> list[int]:
        """See `Curriculum`."""
        # the 2 tells these draws from epochs' orders and from spares
        rng = np.random.default_rng([self.seed, epoch, batch, 2])
        return rng.choice(len(self.prompts), count, replace=False, p=self.probabilities()).tolist()


class FlooredCurriculum(WeightedCurriculum):
    """Draws by an estimate of each prompt's pass rate, with a share that all prompts have alike.

    Args:
        floor: The share of the draws that is spread evenly over all prompts, above 0 and up to 1.
    """

    def __init__(self, floor: float) -> None:
        if not 0 < floor <= 1:
            raise InputError(
                f"`{type(self).__name__}.floor`={floor} is no share that lets every prompt come; use more than 0 "
                "and at most 1, such as 0.1."
            )
        self.floor = floor

    @abstractmethod
    def pass_rates(self) -> np.ndarray:
        """`[P]`, float64, in [0, 1]: the expected reward of a response to each prompt."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """`[P]`, float64, 0 or more: what a draw of each prompt is worth."""

    def probabilities(self) -> np.ndarray:
        """`[P]`: `floor / P + (1 − floor) · w / Σw`; even, where no prompt is worth anything."""
        weights = self.weights()
        total = weights.sum()
        shares = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
        return self.floor / len(weights) + (1 - self.floor) * shares

    def describe(self, positions: np.ndarray) -> dict[str, float]:
        """The mean of the expected pass rates, and how many lie in each fifth of [0, 1]."""
        rates = self.pass_rates()[positions]
        if not len(rates):
            return {}
        counts, _ = np.histogram(rates, bins=5, range=(0.0, 1.0))
        shares = {f"share_{20 * i}_to_{20 * i + 20}": float(n / len(rates)) for i, n in enumerate(counts)}
        return {"expected_pass_rate": float(rates.mean()), **shares}


def check_share(owner: Any, name: str, value: float, way_out: str) -> None:
    """Raise `InputError` where the setting of a curriculum does not lie between 0 and 1."""
    if not 0 < value < 1:
        raise InputError(f"`{type(owner).__name__}.{name}`={value} does not lie between 0 and 1; use {way_out}.")


def check_positive(owner: Any, name: str, value: float, way_out: str) -> None:
    """Raise `InputError` where the setting of a curriculum is not above 0."""
    if not value > 0:
        raise InputError(f"`{type(owner).__name__}.{name}`={value} is not above 0; use {way_out}.")
