"""How a raw row is read: which columns hold the prompt, the gold answer and a demonstration."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

from sppo_lightning.data.sources import PromptSource, Row
from sppo_lightning.errors import InputError, nearest

Turns = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """The columns of a kind of data set; dots reach into nested ones."""

    prompt: str  # text or chat messages
    answer: str  # the gold answer: text or a number
    demonstration: str | None = None  # text or chat messages; the conventional names are tried if None
    marker: str | None = None  # the gold answer is what follows the marker; the whole is a demonstration
    answered: bool = False  # the last message in `prompt` is not part of the prompt, but the demonstration


LAYOUTS: Mapping[str, Layout] = {
    "messages": Layout("prompt", "reward_model.ground_truth"),
    "prompt_answer": Layout("prompt", "answer"),
    "gsm8k": Layout("question", "answer", marker="####"),
    "trl": Layout("prompt", "solution"),
    "chat": Layout("messages", "answer", answered=True),
}
_MAPPABLE = ("prompt", "answer", "demonstration")
_DEMONSTRATIONS = ("demonstration", "response", "completion")


@dataclass(frozen=True, slots=True)
class Record:
    """What a row says, before any chat template."""

    row: int  # from 0
    prompt: str | Turns
    gold: str  # "" where there is none
    demonstration: str | None
    metadata: Mapping[str, Any]  # the columns that nothing else here was read from
    turn: Mapping[str, Any] | None = None  # the assistant's message that `demonstration` is the text of, if any


class RowError(ValueError):
    """Why one row cannot be used, to be completed with the file and the row number."""


@dataclass
class BadRows:
    """The rows of a source that cannot be used, by reason."""

    reasons: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: int, reason: str) -> None:
        """Note that `row` cannot be used for `reason`."""
        self.reasons.setdefault(reason, []).append(row)

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def summary(self) -> str:
        """The count, and the first five reasons with the first five rows of each."""
        details = []
        for reason, rows in list(self.reasons.items())[:5]:
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            details.append(f"row{'s'[: len(rows) > 1]} {', '.join(map(str, rows[:5]))}{more}: {reason}")
        if len(self.reasons) > 5:
            details.append(f"and {len(self.reasons) - 5} more reasons")
        return f"{len(self)} unusable row{'s'[: len(self) > 1]}, counted from 0 ({'; '.join(details)})"


def read_source(source: PromptSource, gold_required: bool = True) -> tuple[list[Record], BadRows]:
    """All rows of `source` by its layout, and those that cannot be used.

    Raises:
        InputError: For a source without rows, an unknown layout, and a column that is not there.
    """
    rows = list(source.rows())
    present = dict.fromkeys(column for row in rows for column in row)
    if not present:
        raise InputError(f"{source.origin} holds no rows; give a source with at least one prompt.")
    layout = resolve_layout(source, present, gold_required)
    records, bad = [], BadRows()
    ids: dict[str | int, int] = {}  # the first row of each
    for number, row in enumerate(rows):
        try:
            if isinstance(own := row.get("id"), str | int) and ids.setdefault(own, number) != number:
                raise RowError("id repeats that of an earlier row")
            records.append(read_row(number, row, layout, gold_required))
        except RowError as error:
            bad.add(number, str(error))
    return records, bad


def resolve_layout(source: PromptSource, present: Collection[str], gold_required: bool) -> Layout:
    """The layout of `source` with its column mapping applied, checked against the columns `present`."""
    mapping: Mapping[str, Any] = source.columns or {}
    for name, column in mapping.items():
        if name not in _MAPPABLE:
            raise InputError(
                f"`columns` of {source.origin} maps {name}{nearest(name, _MAPPABLE)}; its keys are "
                f"{', '.join(_MAPPABLE)}, and other columns go to the metadata as they are."
            )
        if not _has(present, column):
            raise InputError(_no_column(source, f"`columns` maps {name} to", column, present))
    if source.layout == "auto":
        return _recognise(source, present, gold_required)
    if source.layout not in LAYOUTS:
        raise InputError(
            f"`layout`={source.layout} of {source.origin} is unknown{nearest(source.layout, LAYOUTS)}; "
            f"use auto, {', '.join(LAYOUTS)}."
        )
    layout = replace(LAYOUTS[source.layout], **mapping)
    for column in (layout.prompt, layout.answer) if gold_required else (layout.prompt,):
        if not _has(present, column):
            raise InputError(_no_column(source, f"`layout`={source.layout} reads", column, present))
    return layout


def _recognise(source: PromptSource, present: Collection[str], gold_required: bool) -> Layout:
    mapping: Mapping[str, Any] = source.columns or {}
    # a mapped column is read as it is: the marker belongs to the layout's own column
    layouts = [replace(known, **mapping) for known in LAYOUTS.values() if not (known.marker and mapping)]
    for layout in layouts:
        if _has(present, layout.prompt) and _has(present, layout.answer):
            return layout
    for layout in layouts:
        if _has(present, layout.prompt) and not gold_required:
            return layout
    if any(_has(present, layout.prompt) for layout in layouts):
        raise InputError(_no_column(source, "a gold answer is read from", "answer", present))
    raise InputError(
        f"{source.origin} has the columns {', '.join(present)}, which is none of the layouts "
        f"{', '.join(LAYOUTS)}; say with `columns` which hold the prompt and the answer."
    )


def _no_column(source: PromptSource, who: str, column: str, present: Collection[str]) -> str:
    return (
        f"{source.origin} has no column {column.split('.')[0]} ({who} {column}), only {', '.join(present)}; "
        f"name the right one in `columns`."
    )


def _has(present: Collection[str], column: str) -> bool:
    return column in present or column.split(".")[0] in present


def read_row(number: int, row: Row, layout: Layout, gold_required: bool = True) -> Record:
    """What one row says.

    Raises:
        RowError: Where the prompt, the gold answer or a mapped demonstration is missing, of the wrong type or no
            text that can be encoded.
    """
    question = reach(row, layout.prompt)
    shown: str | Mapping[str, Any] | None  # how it is done: text, or the assistant's message
    if layout.answered:
        column, (question, shown) = layout.prompt, _parted(question, layout.prompt)
    else:
        column, shown = _demonstration(row, layout)
    prompt = _prompt(question, layout.prompt)
    demonstration, turn = (str(shown["content"]), shown) if isinstance(shown, Mapping) else (shown, None)
    answer = reach(row, layout.answer)
    place = layout.answer
    if layout.marker is not None and isinstance(answer, str):
        place = f"{layout.answer} after {layout.marker}"
        demonstration = demonstration or answer
        _, found, last = answer.rpartition(layout.marker)
        answer = last.strip().replace(",", "") if found else None
    gold = _gold(answer, place)
    if gold is None and gold_required:
        raise RowError(f"no gold answer in {place}")
    said = prompt if isinstance(prompt, str) else "".join(each["role"] + each["content"] for each in prompt)
    written = demonstration if turn is None else "".join(value for value in turn.values() if isinstance(value, str))
    for name, text in ((layout.prompt, said), (place, gold), (column, written)):
        if any("\ud800" <= character <= "\udfff" for character in text or ""):
            raise RowError(f"{name} holds half of a surrogate pair, which is no character")
    used = {layout.prompt, layout.answer, column}
    metadata = {name: value for name, value in row.items() if name not in used}
    return Record(number, prompt, gold or "", demonstration, metadata, turn)


def reach(row: Row, path: str) -> Any:
    """The value at a dotted path, through nested columns and JSON text; None where there is none."""
    if path in row:
        return _plain(row[path])
    value: Any = row
    for part in path.split("."):
        value = _json(value) if isinstance(value, str) else _plain(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy as Python objects, NaN and infinity as None, everything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(text: str) -> Any:
    """What JSON text says, or None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _messages(value: Any) -> Any:
    """Chat messages that a flat file holds as JSON text; everything else, mere text included, as it is."""
    turns = _json(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    is_chat = isinstance(turns, list) and turns and all(isinstance(t, dict) and "role" in t for t in turns)
    return turns if is_chat else value


def _gold(value: Any, place: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, Number) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"the gold answer in {place} is of type {type(value).__name__}, not text or a number")


def _prompt(value: Any, column: str) -> str | Turns:
    value = _messages(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"no prompt in {column}")
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise RowError(f"{column} is of type {type(value).__name__}, not text or chat messages")
    if not value:
        raise RowError(f"{column} holds no messages")
    turns = []
    for message in value:
        turn = message if isinstance(message, Mapping) else {}
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise RowError(f"{column} has a message without role or content as text")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
        raise RowError(f"{column} has no user message with content")
    if turns[-1]["role"] == "assistant":
        raise RowError(f"{column} ends in an assistant message, where the policy is to answer")
    return tuple(turns)


def _parted(value: Any, column: str) -> tuple[Any, Mapping[str, Any]]:
    """The messages before the assistant's last, which may still be bad, and that one."""
    value = _messages(value)
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{column} holds no chat messages, the last of which would be the demonstration")
    *before, last = value
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise RowError(f"{column} does not end in an assistant message, which would be the demonstration")
    if not before:
        raise RowError(f"{column} has no user message before the assistant's")
    if _last_answer([last]) is None:
        raise RowError(f"the assistant's last message in {column} has no text to learn from")
    return before, last


def _demonstration(row: Row, layout: Layout) -> tuple[str, str | Mapping[str, Any] | None]:
    """The column of the demonstration, and its text or the assistant's message; "" and None where there is none."""
    if layout.demonstration is not None:
        value = reach(row, layout.demonstration)
        answer = _last_answer(value)
        if answer is None and value is not None:
            raise RowError(f"{layout.demonstration} is of type {type(value).__name__} without an answer's text")
        return layout.demonstration, answer
    for column in _DEMONSTRATIONS:
        # a column that only happens to have the name, of another type, is metadata
        if (answer := _last_answer(_plain(row.get(column)))) is not None:
            return column, answer
    return "", None


def _last_answer(value: Any) -> str | Mapping[str, Any] | None:
    """Text as it is, or the last assistant turn of chat messages; None without any text."""
    value = _messages(value)
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "assistant"]
        value = turns[-1] if turns else None
    text = value.get("content") if isinstance(value, Mapping) and value.get("role") == "assistant" else value
    return value if isinstance(text, str) and text.strip() else None
