"""What became of each prompt's responses: two numbers per prompt, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

Key = tuple[str, int]  # (dataset, row) identifies a prompt
Records = dict[Key, tuple[float, float]]  # rewards s and responses n, both decayed


def enter(records: Records, rewards: Sequence[tuple[Key, float]], decay: float) -> None:
    """Add one visit's rewards, those of all ranks, of whose prompts a share `decay` of the records is left.

    Several responses to a prompt are one visit.
    """
    for key in {key for key, _ in rewards}:
        successes, responses = records.get(key, (0.0, 0.0))
        records[key] = (decay * successes, decay * responses)
    for key, reward in rewards:
        successes, responses = records[key]
        records[key] = (successes + reward, responses + 1)


def to_rows(records: Records) -> list[tuple[str, int, float, float]]:
    """The records in plain types."""
    return [(*key, *record) for key, record in records.items()]


def from_rows(rows: Sequence[tuple[str, int, float, float]]) -> Records:
    """The records that `to_rows` was given."""
    return {(dataset, row): (s, n) for dataset, row, s, n in rows}
