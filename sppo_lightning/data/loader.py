"""The loader of prompt batches: drawn by a curriculum, sharded by rank, resumable after any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.data.curriculum import Curriculum, UniformSampling
from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.errors import InputError

_MANY_DRAWS = 2**32  # more than a run draws spares


class PromptLoader:
    """A sized iterable of this rank's `PromptBatch`es, whose position Lightning saves with a checkpoint.

    Every rank yields the same number of batches. Position `p` of a global batch goes to rank
    `p % world_size`, so a contiguous slice of it holds the same prompts on any number of ranks. An iterator
    of which no batch was drawn changes nothing; one that follows a started epoch begins the next epoch,
    unless a state was loaded: then it goes on behind the last batch that was yielded.

    A batch is drawn when it is asked for, so that a curriculum knows the outcomes of the one before; or earlier,
    when that one is asked for its `upcoming`, and then a state holds what was drawn.

    Args:
        prompts: The prompts of the whole data set.
        prompt_format: Tokenizes them, batch by batch: text is smaller than ids, and the engine wants both.
        batch_size: Prompts per batch, over all ranks.
        rank: This rank among those that share the data.
        world_size: How many ranks share the data.
        train: Drop an incomplete last batch, and count visits; otherwise every prompt comes, visit 0.
        curriculum: Draws the prompts of each batch; `UniformSampling` if left out.
        shuffle: Draw the prompts of each epoch in an order of its own.
        seed: Of all draws.
        epoch_batches: Batches after which Lightning ends the epoch, where `limit_train_batches` is set.

    Raises:
        InputError: In training, for fewer prompts than `batch_size`, and for one the ranks do not divide.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_format: PromptFormat,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        train: bool = False,
        curriculum: Curriculum | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch_batches: int | None = None,
    ) -> None:
        if train:
            _check_batch_size(batch_size, len(prompts), world_size)
        self.prompts = prompts
        self.prompt_format = prompt_format
        self.batch_size = batch_size
        self.train = train
        self.curriculum = curriculum or UniformSampling()
        self.curriculum.bind(prompts, batch_size, seed, shuffle)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch_batches = len(self) if epoch_batches is None else min(epoch_batches, len(self))
        self._epoch = 0
        self._batches = 0  # yielded in this epoch
        self._spare_draws = 0  # calls of `spare` in all epochs
        self._resumed = False
        self._ahead: tuple[tuple[int, int], list[int], PromptBatch] | None = None  # drawn for an epoch's batch

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.prompts) // self.batch_size if self.train else -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        # the body of a generator starts at its first `next`: Lightning makes iterators it never draws from
        if self._batches >= self._epoch_batches or (self._batches > 0 and not self._resumed):
            self._epoch, self._batches = self._epoch + 1, 0
        self._resumed = False
        while self._batches < self._epoch_batches:
            batch = self._drawn(self._next)
            self._batches += 1
            self._ahead = None
            batch.draw_upcoming = partial(self._drawn, self._next) if self.train else None
            yield batch

    @property
    def _next(self) -> tuple[int, int]:
        """Epoch and number of the batch that comes next: behind an epoch's last, the next one's first."""
        finished = self._batches >= self._epoch_batches
        return (self._epoch + 1, 0) if finished else (self._epoch, self._batches)

    def _drawn(self, place: tuple[int, int], indices: list[int] | None = None) -> PromptBatch:
        """Give this rank's share of the batch at `place`: of `indices`, or of what is drawn, once."""
        if self._ahead is None or self._ahead[0] != place:
            indices = self.curriculum.draw(self.batch_size, *place) if indices is None else indices
            mine = indices[self.rank :: self.world_size]
            visit = self.curriculum.visit(*place) if self.train else 0
            self._ahead = place, indices, self._batch(mine, [visit] * len(mine))
        return self._ahead[2]

    def spare(self, count: int) -> PromptBatch:
        """`count` more training prompts for this rank, drawn at random, without effect on the epoch's order.

        They depend on the seed and on the number of calls before, and are distinct until the rank's share of
        the prompts is used up; in one call no other rank draws from that share. Every rank must call it equally
        often, with 0 where it needs none, since a checkpoint holds the position of one rank for all.
        """
        draw, self._spare_draws = self._spare_draws, self._spare_draws + 1
        # the 1 tells this order from that of an epoch
        order = np.random.default_rng([self.seed, draw, 1]).permutation(len(self.prompts)).tolist()
        share = order[self.rank :: self.world_size]
        # below 0, where no epoch is, and another one each time that a prompt comes
        visits = [-1 - draw - (i // len(share)) * _MANY_DRAWS for i in range(count)]
        return self._batch([share[i % len(share)] for i in range(count)], visits)

    def longest(self, count: int) -> PromptBatch:
        """The `count` longest prompts of the data set, in characters, or all where it has fewer; on every rank."""
        return self.at(sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i].text))[:count])

    def at(self, positions: Sequence[int]) -> PromptBatch:
        """The prompts at `positions`, without effect on what is drawn."""
        return self._batch(positions, visits=[0] * len(positions))

    def at_random(self, count: int) -> PromptBatch:
        """`count` prompts (or all) of the data set, the same on any number of ranks that share them; no trace."""
        # the 2 tells this order from those of epochs and of spares
        order = np.random.default_rng([self.seed, 0, 2]).permutation(len(self.prompts))[:count].tolist()
        mine = order[self.rank :: self.world_size]
        return self._batch(mine, visits=[0] * len(mine))

    def _batch(self, indices: Sequence[int], visits: list[int]) -> PromptBatch:
        prompts = [self.prompts[i] for i in indices]
        return PromptBatch(prompts, self.prompt_format.encode([prompt.text for prompt in prompts]), visits)

    def _identity(self) -> dict[str, int]:
        return {"prompts": len(self.prompts), "batch_size": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The epoch (the next one if this is finished), the batches yielded in it, draws of spares, the data.

        And what was drawn ahead, where it cannot be drawn again because the curriculum learns.
        """
        epoch, batches = self._next
        state: dict[str, Any] = {
            "epoch": epoch,
            "batches": batches,
            "spare_draws": self._spare_draws,
            **self._identity(),
        }
        if self.curriculum.adapts and self._ahead is not None and self._ahead[0] == self._next:
            state["upcoming"] = [*self._ahead[1]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last batch that was yielded when `state_dict` was taken.

        Raises:
            InputError: In the middle of an epoch, where prompts, batch size or seed are not those of then.
        """
        before = {name: state_dict[name] for name in self._identity()}
        if state_dict["batches"] and before != self._identity():
            changed = [f"{k}={v} (then {before[k]})" for k, v in self._identity().items() if v != before[k]]
            raise InputError(
                f"The checkpoint is from the middle of an epoch, which cannot go on with "
                f"{', '.join(changed)}; resume with what it had, or start a new run from its weights."
            )
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self._spare_draws = state_dict.get("spare_draws", 0)  # older checkpoints know of no spares
        self._resumed, self._ahead = True, None
        if "upcoming" in state_dict and before == self._identity():
            self._drawn(self._next, state_dict["upcoming"])


def _check_batch_size(batch_size: int, prompts: int, world_size: int) -> None:
    if prompts < world_size:
        raise InputError(
            f"There {'is 1 training prompt' if prompts == 1 else f'are {prompts} training prompts'} for "
            f"{world_size} ranks; give at least one per rank, or use fewer ranks."
        )
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        raise InputError(
            f"`batch_size`={batch_size} cannot be shared by {world_size} ranks; "
            f"use {f'{below} or ' if below else ''}{above}."
        )
    if prompts < batch_size:
        raise InputError(
            f"`batch_size`={batch_size} is more than the {prompts} training prompts, so there is no whole "
            f"batch; use {prompts // world_size * world_size} or less."
        )
