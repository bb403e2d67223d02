"""A run's own good responses as demonstrations: rejection-sampling fine-tuning."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from sppo_lightning.data.sources import PromptSource, Row
from sppo_lightning.errors import InputError, check_option, readable_path, shortened

_ROWS_AT_ONCE = 1024
_COLUMNS = ("dataset", "row", "prompt", "gold", "response", "finish_reason", "response_tokens", "iteration")

Preference = Literal["shortest", "newest"]
Question = tuple[str, int, str, str]  # data set, row, prompt, gold
Order = tuple[int, ...]  # what is kept first is smaller


class CompletionSource(PromptSource):
    """Good responses from the shards of `CompletionLog`, as demonstrations for `SFTModule`.

    Of each prompt the best few are kept, each text once, in the order of data set and row. Prompts are read as the
    policy has read them: no template, suffix or system prompt is applied again. Shards are read piece by piece, and
    memory holds what is kept.

    Source: rejection-sampling fine-tuning, as in Yuan et al. 2023, arXiv 2308.01825, section 3.3.

    Args:
        path: Folder of the shards, `CompletionLog.path`.
        min_score: Responses below this score are left out, and those without a verdict.
        score: The column that is meant: `reward`, or `score/<verifier>` for one verifier's.
        per_prompt: Most responses that are kept of each prompt.
        prefer: Which of them, where there are more: the `shortest`, in tokens, or the `newest`.
    """

    layout = "prompt_answer"
    rendered = True

    def __init__(
        self,
        path: str,
        min_score: float = 1.0,
        score: str = "reward",
        per_prompt: int = 4,
        prefer: Preference = "shortest",
    ) -> None:
        if per_prompt < 1:
            raise InputError(f"`CompletionSource.per_prompt`={per_prompt} keeps nothing; use 1 or more.")
        if not math.isfinite(min_score):
            raise InputError(f"`CompletionSource.min_score`={min_score} is no score; use a finite number.")
        check_option("CompletionSource.prefer", prefer, Preference)
        self.path = path
        self.min_score = min_score
        self.score = score
        self.per_prompt = per_prompt
        self.prefer = prefer

    @property
    def origin(self) -> str:
        """The folder."""
        return self.path

    def rows(self) -> list[Row]:
        """One row for each response that is kept: `prompt`, `answer` and `demonstration`.

        Raises:
            InputError: Where there are no shards, where they have no such score, and where nothing is left.
        """
        kept: dict[Question, dict[str, Order]] = {}
        counts: Counter[str] = Counter()
        for row in self._responses():
            why = self._left_out(row)
            counts[why or "kept"] += 1
            if why is None:
                question = (row["dataset"], row["row"], row["prompt"], row["gold"])
                self._keep(kept.setdefault(question, {}), row)
        if not kept:
            found = ", ".join(f"{count} {why}" for why, count in counts.items()) or "no rows"
            raise InputError(
                f"`CompletionSource.path`={self.path} has no response to learn from ({found}); lower `min_score`, "
                "or log more iterations."
            )
        return [
            {"prompt": prompt, "answer": gold, "demonstration": response}
            for (_, _, prompt, gold), responses in sorted(kept.items())
            for response in sorted(responses, key=lambda each: (responses[each], each))
        ]

    def _left_out(self, row: Row) -> str | None:
        """Why a response is not learned from."""
        score = row[self.score]
        if score is None:
            return "without a verdict"
        if score < self.min_score:
            return f"with `{self.score}` below `min_score`={self.min_score:g}"
        if row["finish_reason"] != "stop":
            return "cut off"
        return None if row["response"].strip() else "without text"

    def _keep(self, responses: dict[str, Order], row: Row) -> None:
        """Add the row's response, and let the last in the order go where there are too many."""
        length, age = row["response_tokens"], -row["iteration"]
        order = (length, age) if self.prefer == "shortest" else (age, length)
        text = row["response"]
        responses[text] = min(order, responses.get(text, order))
        if len(responses) > self.per_prompt:
            del responses[max(responses, key=lambda each: (responses[each], each))]

    def _responses(self) -> Iterator[dict[str, Any]]:
        folder = readable_path(self.path, "path")
        shards = sorted(folder.glob("iteration-*.parquet")) if folder.is_dir() else []
        if not shards:
            raise InputError(
                f"`CompletionSource.path`={self.path} is no folder with shards of CompletionLog; give the `path` "
                "of the run's CompletionLog."
            )
        for shard in shards:
            yield from self._shard(shard)

    def _shard(self, shard: Path) -> Iterator[dict[str, Any]]:
        try:
            with pq.ParquetFile(shard) as file:
                scores = [name for name in file.schema_arrow.names if name == "reward" or name.startswith("score/")]
                if self.score not in scores:
                    raise InputError(
                        f"`CompletionSource.score`={self.score} is no score in {shard}, which has "
                        f"{shortened(', '.join(scores))}; use one of these."
                    )
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[*_COLUMNS, self.score]):
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
            if isinstance(error, InputError):
                raise
            reason = str(error).split("\n")[0].rstrip(".")
            raise InputError(f"The shard {shard} cannot be read: {reason}; remove it.") from error
