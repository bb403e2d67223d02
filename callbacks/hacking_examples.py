"""The worst responses that HackingMonitor has seen, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from sppo_lightning.callbacks.run_summary import plain
from sppo_lightning.callbacks.sample_log import escape, markdown_table, shorten, tensorboard_loggers
from sppo_lightning.files import replace_file

_MAX_CHARACTERS = 1000  # of a prompt or a response in TensorBoard


def write_examples(path: Path, examples: Sequence[dict[str, Any]], trainer: Trainer) -> None:
    """Write the examples to `path`, one JSON object a line, and to TensorBoard as `hacking/examples`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(as_line(example) + "\n" for example in examples)
    replace_file(path, lambda draft: draft.write_text(lines, encoding="ascii"))
    step = trainer.fit_loop.total_batch_idx  # as the scalars of this iteration
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_text("hacking/examples", examples_table(examples), step)


def as_line(example: dict[str, Any]) -> str:
    """One line of printable ASCII, whatever a response holds: a terminal that shows it does nothing else."""
    return json.dumps(plain(example), allow_nan=False).replace("\x7f", "\\u007f")


def examples_table(examples: Sequence[dict[str, Any]]) -> str:
    """A markdown table of the examples; nothing that a prompt or response holds is read as markdown or HTML."""
    headings = ["iteration", "reward", "reasons", "prompt", "response", "gold"]
    rows = [
        [
            str(example["iteration"]),
            f"{example['reward']:.2f}",
            escape("\n".join(example["reasons"])),
            *(escape(shorten(example[name], _MAX_CHARACTERS)) for name in ("prompt", "response", "gold")),
        ]
        for example in examples
    ]
    return markdown_table(headings, rows)
