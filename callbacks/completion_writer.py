"""The callback that turns `predict` into a file of scored completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks.completions import completion_rows, completion_schema
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import check_requirements


class CompletionWriter(Callback):
    """Writes every completion of `predict`, one row each, with its scores.

    Columns: dataset, row, prompt, response, gold, finish_reason, response_tokens, reward, and `score/<name>`
    for each verifier; a missing verdict is null. The file appears when `predict` is complete, all ranks' rows
    together.

    Args:
        path: File to write, ending in .parquet or .jsonl. Several ranks need it on a file system that all
            share.
    """

    def __init__(self, path: str = "runs/completions.parquet") -> None:
        super().__init__()
        self.path = Path(path)
        if self.path.suffix not in (".parquet", ".jsonl"):
            raise InputError(
                f"`CompletionWriter.path`={path!r} names no known format; end it in .parquet or .jsonl."
            )
        self._part: _Part | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that `predict` will have something to write."""
        if stage == "predict":
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            check_requirements(["rollouts"], callbacks, callbacks, type(self).__name__)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._open(self._part_path(trainer.global_rank), completion_schema(trainer))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's rows to this rank's part."""
        if self._part is not None and batch.rollouts is not None and len(batch.rollouts):
            self._part.write(completion_rows(batch.rollouts))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the parts and join them into the file."""
        if self._part is None:
            return
        self._part.close()
        self._part = None
        trainer.strategy.barrier("CompletionWriter: all parts are closed")
        if trainer.is_global_zero:
            self._join([self._part_path(rank) for rank in range(trainer.world_size)])
        trainer.strategy.barrier("CompletionWriter: the parts are joined")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close this rank's part, which stays beside where the file would be."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def _part_path(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}.part")

    def _open(self, path: Path, schema: pa.Schema) -> _Part:
        return _ParquetPart(path, schema) if self.path.suffix == ".parquet" else _JsonLinesPart(path)

    def _join(self, parts: list[Path]) -> None:
        missing = [part.name for part in parts if not part.exists()]
        if missing:
            raise InputError(
                f"`CompletionWriter.path`={str(self.path)!r} is on a file system that not all ranks share: "
                f"rank 0 does not see {missing[0]}; use a path that they share."
            )
        first, *others = parts
        if others:
            whole = self.path.with_name(f"{self.path.name}.part")
            _join_parquet(parts, whole) if self.path.suffix == ".parquet" else _join_text(parts, whole)
            for part in parts:
                part.unlink()
            first = whole
        first.replace(self.path)  # atomic, so a reader never sees half a file


class _Part(Protocol):
    """One rank's rows while they are written."""

    def write(self, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _ParquetPart:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema)

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._writer.schema))

    def close(self) -> None:
        self._writer.close()


class _JsonLinesPart:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()


def _join_parquet(parts: list[Path], whole: Path) -> None:
    with pq.ParquetWriter(whole, pq.read_schema(parts[0])) as writer:
        for part in parts:
            with pq.ParquetFile(part) as source:
                for batch in source.iter_batches():  # not at once: completions of a whole run are large
                    writer.write_batch(batch)


def _join_text(parts: list[Path], whole: Path) -> None:
    with whole.open("w", encoding="utf-8") as target:
        for part in parts:
            with part.open(encoding="utf-8") as source:
                target.writelines(source)
