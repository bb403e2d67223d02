"""Every response that was learned from, as Parquet shards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks.completions import completion_rows, completion_schema
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Experience
from sppo_lightning.files import replace_file

_SHARD = re.compile(r"\.?iteration-(?P<iteration>\d+)\.rank(?P<rank>\d+)\.parquet")
_MORE = [("iteration", pa.int64()), ("advantage", pa.float32()), ("value", pa.float32())]
_MORE += [("policy_version", pa.int64())]


class CompletionLog(Callback):
    """Writes the responses of each iteration to a Parquet shard, with what the updates made of them.

    Columns: those of `CompletionWriter`, and iteration (counted from 1), advantage and value, both as the updates
    used them, and policy_version, the number of updates behind the weights that sampled the response. Where each
    token has its own, advantage is the mean over the response's tokens and value the one before the first. The
    advantage of a response without a verdict is null: nothing was learned from it.

    Each rank has its own shards, `iteration-000012.rank0.parquet`, so no rank waits for another. A shard that
    cannot be written, on a full disk for instance, is warned of and left out. A run that goes on from a
    checkpoint removes the shards of later iterations, and one that starts anew those of the run before it.

    Args:
        path: Folder of the shards.
        every_n_iterations: Iterations from one shard to the next; the first iteration has one.
        max_iterations: Shards that are kept of each rank, the newest; all where null.
        max_bytes: Bytes that the shards of all ranks may take; the newest is always kept; no limit where null.
    """

    def __init__(
        self,
        path: str = "runs/rollouts",
        every_n_iterations: int = 1,
        max_iterations: int | None = 1000,
        max_bytes: int | None = 4 * 2**30,
    ) -> None:
        limits = {
            "every_n_iterations": every_n_iterations,
            "max_iterations": max_iterations,
            "max_bytes": max_bytes,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise InputError(f"`CompletionLog.{name}`={value} keeps nothing; use 1 or more.")
        self.path = Path(path)
        self.every_n_iterations = every_n_iterations
        self.max_iterations = max_iterations
        self.max_bytes = max_bytes
        self._schema = pa.schema([])
        self._kept: dict[Path, int] = {}  # bytes of this rank's shards, from the oldest on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder."""
        if stage != "fit":
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"`CompletionLog.path`={str(self.path)!r} cannot be made ({error}); give a folder that can."
            ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find this rank's shards, and remove those of iterations that are still to come."""
        self._schema = completion_schema(trainer, _MORE)
        done = trainer.fit_loop.total_batch_idx + 1
        self._kept, removed = {}, 0
        for file, iteration in self._own_files(trainer):
            if iteration > done or file.name.startswith("."):  # a draft of a run that was killed
                file.unlink(missing_ok=True)
                removed += 1
            else:
                self._kept[file] = file.stat().st_size
        if removed and not done:
            rank_zero_warn(f"CompletionLog has removed {removed} files of an earlier run from {self.path}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Write this rank's shard, and remove the oldest where there are too many."""
        experience = (outputs or {}).get("experience")  # supervised learning has none
        iteration = trainer.fit_loop.total_batch_idx + 1
        if experience is None or (iteration - 1) % self.every_n_iterations:
            return
        shard = self.path / f"iteration-{iteration:06d}.rank{trainer.global_rank}.parquet"
        table = pa.Table.from_pylist(learned_rows(experience, iteration), self._schema)
        try:
            replace_file(shard, lambda draft: pq.write_table(table, draft, compression="zstd"))
            self._kept.pop(shard, None)
            self._kept[shard] = shard.stat().st_size
            self._rotate(trainer.world_size)
        except OSError as error:
            warnings.warn(
                f"CompletionLog could not write to {self.path} ({error.strerror or error}); training goes on.",
                stacklevel=2,
            )

    def _own_files(self, trainer: Trainer) -> Iterator[tuple[Path, int]]:
        """Shards of this rank with their iterations, by name; those of ranks that are no more are the first's."""
        for file in sorted(self.path.iterdir()):
            if match := _SHARD.match(file.name):
                rank = int(match["rank"])
                if trainer.global_rank == (rank if rank < trainer.world_size else 0):
                    yield file, int(match["iteration"])

    def _rotate(self, ranks: int) -> None:
        """Remove this rank's oldest shards until it is within its share of the limits."""
        most = len(self._kept) if self.max_iterations is None else self.max_iterations
        total, limit = sum(self._kept.values()), self.max_bytes and self.max_bytes / ranks
        for shard, size in list(self._kept.items())[:-1]:
            if len(self._kept) <= most and (limit is None or total <= limit):
                break
            shard.unlink(missing_ok=True)
            del self._kept[shard]
            total -= size


def learned_rows(experience: Experience, iteration: int) -> list[dict[str, Any]]:
    """`completion_rows` of what an iteration learned from, with what the updates made of each response."""
    rollouts, mask = experience.rollouts, experience.rollouts.response_mask
    advantages, values = experience.advantages, experience.values
    if advantages.ndim == 2:
        advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
    if values is not None and values.ndim == 2:
        values = values[:, 0]
    columns = {
        "advantage": _numbers(advantages, experience.verdicts),
        "value": [None] * len(rollouts) if values is None else values.tolist(),
        "policy_version": rollouts.policy_versions.tolist(),
    }
    return [
        {"iteration": iteration, **row, **{name: column[i] for name, column in columns.items()}}
        for i, row in enumerate(completion_rows(rollouts))
    ]


def _numbers(values: Tensor, known: Tensor) -> list[float | None]:
    return [value if is_known else None for value, is_known in zip(values.tolist(), known.tolist(), strict=True)]
