"""The loader of prompt batches: sharded by rank, shuffled by epoch, resumable after any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.errors import InputError


class PromptLoader:
    """A sized iterable of this rank's `PromptBatch`es, whose position Lightning saves with a checkpoint.

    Every rank yields the same number of batches. Position `p` of a global batch goes to rank
    `p % world_size`, so a contiguous slice of it holds the same prompts on any number of ranks. An iterator
    of which no batch was drawn changes nothing; one that follows a started epoch begins the next epoch,
    unless a state was loaded: then it goes on behind the last batch that was yielded.

    Args:
        prompts: The prompts of the whole data set.
        prompt_format: Tokenizes them, batch by batch: text is smaller than ids, and the engine wants both.
        batch_size: Prompts per batch, over all ranks.
        rank: This rank among those that share the data.
        world_size: How many ranks share the data.
        train: Drop an incomplete last batch, and count visits; otherwise every prompt comes, visit 0.
        shuffle: Draw the prompts of each epoch in an order of its own.
        seed: With the epoch, all that the order depends on.
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
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch_batches = len(self) if epoch_batches is None else min(epoch_batches, len(self))
        self._epoch = 0
        self._batches = 0  # yielded in this epoch
        self._resumed = False

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.prompts) // self.batch_size if self.train else -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        # the body of a generator starts at its first `next`: Lightning makes iterators it never draws from
        if self._batches >= self._epoch_batches or (self._batches > 0 and not self._resumed):
            self._epoch, self._batches = self._epoch + 1, 0
        self._resumed = False
        order = self.order(self._epoch)
        while self._batches < self._epoch_batches:
            start = self._batches * self.batch_size
            self._batches += 1
            yield self._collate(order[start : start + self.batch_size])

    def order(self, epoch: int) -> list[int]:
        """The prompts' indices in the order of an epoch, a function of the seed and the epoch alone."""
        if not self.shuffle:
            return list(range(len(self.prompts)))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)).tolist()

    def _collate(self, indices: Sequence[int]) -> PromptBatch:
        prompts = [self.prompts[i] for i in indices[self.rank :: self.world_size]]
        token_ids = self.prompt_format.encode([prompt.text for prompt in prompts])
        return PromptBatch(prompts, token_ids, visits=[self._epoch if self.train else 0] * len(prompts))

    def _identity(self) -> dict[str, int]:
        return {"prompts": len(self.prompts), "batch_size": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The epoch (the next one if this is finished), the batches yielded in it, and what they refer to."""
        finished = self._batches >= self._epoch_batches
        epoch, batches = (self._epoch + 1, 0) if finished else (self._epoch, self._batches)
        return {"epoch": epoch, "batches": batches, **self._identity()}

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
        self._resumed = True


def _check_batch_size(batch_size: int, prompts: int, world_size: int) -> None:
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        raise InputError(
            f"`batch_size`={batch_size} cannot be shared by {world_size} ranks; "
            f"use {f'{below} or ' if below else ''}{above}."
        )
    if prompts < batch_size:
        most = prompts // world_size * world_size
        raise InputError(
            f"`batch_size`={batch_size} is more than the {prompts} training prompts, so there is no whole "
            f"batch; use {f'{most} or less' if most else f'at least {world_size} prompts, one per rank'}."
        )
