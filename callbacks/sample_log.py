"""What the policy writes, and what the critic thought of it, for TensorBoard."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.figures import value_against_reward
from sppo_lightning.ranks import gather_rows


class SampleLog(Callback):
    """Shows sampled responses as a table, and V against reward as a figure, in TensorBoard.

    The figure holds the responses of one iteration over all ranks, with V as it was before the iteration's
    updates; it costs one forward of the critic. Other loggers get nothing.

    Args:
        every_n_iterations: Iterations from one table and figure to the next; the first iteration has them.
        samples: Responses in the table, spread evenly over the batch of the first rank.
        max_characters: Longer prompts and responses lose their middle.
    """

    def __init__(self, every_n_iterations: int = 10, samples: int = 4, max_characters: int = 1000) -> None:
        settings = {
            "every_n_iterations": every_n_iterations,
            "samples": samples,
            "max_characters": max_characters,
        }
        for name, value in settings.items():
            if value < 1:
                raise InputError(f"`SampleLog.{name}`={value} shows nothing; use 1 or more.")
        self.every_n_iterations = every_n_iterations
        self.samples = samples
        self.max_characters = max_characters
        self._values: Tensor | None = None  # [B], of this iteration's prompts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so where there is nothing to write to."""
        if stage == "fit" and not tensorboard_loggers(trainer):
            rank_zero_info("SampleLog writes to TensorBoard only, and `trainer.logger` has no TensorBoardLogger.")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Ask the critic before the updates teach it these prompts' outcomes."""
        self._values = None
        if self._is_due(trainer) and len(batch):
            with trainer.precision_plugin.forward_context():
                self._values = pl_module.prompt_values(batch)  # type: ignore[operator]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Write the table and, with a critic, the figure."""
        rollouts = batch.rollouts
        if not self._is_due(trainer) or rollouts is None or not len(rollouts):
            return
        values = None if self._values is None else self._values[rollouts.prompt_index]
        step = trainer.fit_loop.total_batch_idx  # as the scalars of this iteration
        table = sample_table(rollouts, values, self.samples, self.max_characters)
        figure = None
        if values is not None:
            predicted, observed = gather_rows(torch.stack([values.float(), rollouts.rewards], dim=1)).T.cpu()
            figure = value_against_reward(predicted.numpy(), observed.numpy()) if trainer.is_global_zero else None
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text("samples", table, step)
            if figure is not None:
                logger.experiment.add_figure("critic/value_against_reward", figure, step, close=False)

    def _is_due(self, trainer: Trainer) -> bool:
        # the same on every rank, because the critic's forward and the gathering need them all
        return (
            bool(tensorboard_loggers(trainer)) and trainer.fit_loop.total_batch_idx % self.every_n_iterations == 0
        )


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that take text and figures."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def sample_table(rollouts: Rollouts, values: Tensor | None, samples: int, max_characters: int) -> str:
    """A markdown table of `samples` responses, spread evenly over the rollouts.

    `values` `[N]` are the critic's V, or None without a critic. Nothing that a prompt or response holds is
    read as markdown or HTML.
    """
    headings = ["prompt", "response", "gold", "reward", *([] if values is None else ["V"]), "finish reason"]
    lines = []
    count = min(samples, len(rollouts))
    for row in [i * len(rollouts) // count for i in range(count)]:
        prompt, reward = rollouts.prompts[row], float(rollouts.rewards[row])
        texts = [shorten(text, max_characters) for text in (prompt.text, rollouts.responses[row], prompt.gold)]
        cells = [escape(text) for text in texts]
        cells.append("no verdict" if reward != reward else f"{reward:.2f}")
        cells += [] if values is None else [f"{float(values[row]):.2f}"]
        lines.append([*cells, rollouts.finish_reasons[row]])
    return markdown_table(headings, lines)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are markdown already: see `escape`."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(headings), *lines[1:]])


def shorten(text: str, max_characters: int) -> str:
    """`text` without its middle where it is longer: the end is where the answer stands."""
    if len(text) <= max_characters:
        return text
    head = max_characters // 2
    tail = max_characters - head
    return f"{text[:head]} … [{len(text) - max_characters} characters left out] … {text[-tail:]}"


def escape(text: str) -> str:
    """`text` as a markdown table's cell that shows just these characters.

    Punctuation becomes character references, line breaks `<br>`; what does not print (control characters,
    text direction marks, lone surrogates) becomes the replacement character.
    """
    lines = []
    for line in text.splitlines() or [""]:
        printable = "".join("\ufffd" if unicodedata.category(c)[0] == "C" and c != "\t" else c for c in line)
        lines.append(re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", printable))
    return "<br>".join(lines)
