"""CompletionSource: what is kept of a run's own responses, by hand."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_lightning.data import CompletionSource, completions
from sppo_lightning.errors import InputError

# iteration, row, response, finish_reason, tokens, reward, score/form
RESPONSES = [
    (1, 0, "a long answer", "stop", 4, 1.0, 0.0),
    (1, 1, "wrong", "stop", 2, 0.0, 1.0),
    (1, 2, "cut", "length", 8, 1.0, 1.0),
    (1, 3, "who knows", "stop", 3, None, 1.0),
    (2, 0, "short", "stop", 2, 1.0, 1.0),
    (2, 0, "a long answer", "stop", 4, 1.0, 0.0),
    (2, 1, "half right", "stop", 3, 0.5, 1.0),
    (3, 0, "an answer", "stop", 3, 1.0, 1.0),
    (3, 4, " ", "stop", 1, 1.0, 1.0),
]
SCHEMA = pa.schema(
    [("iteration", pa.int64()), ("dataset", pa.string()), ("row", pa.int64()), ("prompt", pa.string())]
    + [("gold", pa.string()), ("response", pa.string()), ("finish_reason", pa.string())]
    + [("response_tokens", pa.int64()), ("reward", pa.float32()), ("score/form", pa.float32())]
)


def write(folder: Path, rows: list[tuple[Any, ...]] = RESPONSES) -> str:
    """A shard for each iteration."""
    names = ("iteration", "row", "response", "finish_reason", "response_tokens", "reward", "score/form")
    for iteration in {row[0] for row in rows}:
        found = [dict(zip(names, row, strict=True)) for row in rows if row[0] == iteration]
        full = [row | {"dataset": "train", "prompt": f"question {row['row']}", "gold": "5"} for row in found]
        shard = folder / f"iteration-{iteration:06d}.rank0.parquet"
        pq.write_table(pa.Table.from_pylist(full, SCHEMA), shard)
    return str(folder)


def kept(path: str, **settings: Any) -> list[tuple[int, str]]:
    rows = CompletionSource(path, **settings).rows()
    assert {row["answer"] for row in rows} == {"5"}
    return [(int(row["prompt"].removeprefix("question ")), row["demonstration"]) for row in rows]


def test_the_best_few_distinct_responses_of_each_prompt(tmp_path: Path):
    path = write(tmp_path)
    assert kept(path) == [(0, "short"), (0, "an answer"), (0, "a long answer")]
    assert kept(path, per_prompt=2) == [(0, "short"), (0, "an answer")]
    # "a long answer" came again in iteration 2, after "short" in length but not in age
    assert kept(path, per_prompt=2, prefer="newest") == [(0, "an answer"), (0, "short")]
    assert kept(path, min_score=0.5, per_prompt=1) == [(0, "short"), (1, "half right")]
    assert kept(path, score="score/form", per_prompt=1) == [(0, "short"), (1, "wrong"), (3, "who knows")]


def test_the_newest_of_the_same_text_counts(tmp_path: Path):
    path = write(tmp_path, [(i, 0, text, "stop", 2, 1.0, 1.0) for i, text in enumerate("xyx")])
    assert kept(path, per_prompt=1, prefer="newest") == [(0, "x")]


def test_memory_holds_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(completions, "_ROWS_AT_ONCE", 10)
    most = []

    class Counting(CompletionSource):
        def _keep(self, responses: Any, row: Any) -> None:
            super()._keep(responses, row)
            most.append(len(responses))

    rows = [(1, 0, f"{i:03d}", "stop", 500 - i, 1.0, 1.0) for i in range(500)]
    assert [row["demonstration"] for row in Counting(write(tmp_path, rows), per_prompt=2).rows()] == ["499", "498"]
    assert (len(most), max(most)) == (500, 2)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            RESPONSES,
            {"min_score": 2.0},
            r"has no response to learn from \(8 with `reward` below `min_score`=2, 1 without a verdict\); lower",
        ),
        (RESPONSES[2:4] + RESPONSES[8:], {}, r"\(1 cut off, 1 without a verdict, 1 without text\)"),
        (
            RESPONSES,
            {"score": "score/from"},
            r"`.*score`=score/from is no score in .* which has reward, score/form;",
        ),
        (RESPONSES, {"per_prompt": 0}, r"`CompletionSource.per_prompt`=0 keeps nothing; use 1 or more"),
        (RESPONSES, {"prefer": "longest"}, r"`CompletionSource.prefer`=longest is unknown; use shortest or newest"),
        (RESPONSES, {"min_score": float("nan")}, r"`CompletionSource.min_score`=nan is no score"),
        ([], {}, r"is no folder with shards of CompletionLog; give the `path`"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, rows: Any, settings: dict[str, Any], message: str):
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        CompletionSource(path, **settings).rows()


def test_a_damaged_shard_is_named(tmp_path: Path):
    path = write(tmp_path)
    (tmp_path / "iteration-000009.rank0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        InputError, match=r"The shard .*iteration-000009.rank0.parquet cannot be read: .*; remove it"
    ):
        CompletionSource(path).rows()
