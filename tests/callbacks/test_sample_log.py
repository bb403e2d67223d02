import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tiny_run import data, sft, sppo, stages, trainer_of, weights
from toy_pipeline import rollouts_of

from sppo_lightning.batch import Scores
from sppo_lightning.callbacks.sample_log import SampleLog, escape, sample_table, shorten
from sppo_lightning.errors import InputError


class Cells(HTMLParser):
    """The rows of an HTML table, as a browser would show their text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, text: str) -> None:
        if self.rows and self.rows[-1] and text.strip():
            self.rows[-1][-1] += text


def events(logger: TensorBoardLogger) -> EventAccumulator:
    return EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()


def shown(accumulator: EventAccumulator) -> dict[int, list[list[str]]]:
    """The sampled tables by step, as TensorBoard renders them."""
    found = accumulator.Tensors("samples/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0] for event in found}
    return {step: Cells(markdown_to_safe_html(text)).rows for step, text in texts.items()}


def test_every_other_iteration_has_a_table_and_a_figure(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = sppo(tmp_path)
    log = SampleLog(every_n_iterations=2, samples=3)
    trainer_of([*stages(), log], logger=logger).fit(module, datamodule=data())
    accumulator = events(logger)
    tables = shown(accumulator)
    assert list(tables) == [0, 2]
    headings, *rows = tables[0]
    assert headings == ["prompt", "response", "gold", "reward", "V", "finish reason"]
    assert len(rows) == 3
    # the value head starts at zero, and V is asked for before the updates
    assert {row[4] for row in rows} == {"0.50"}
    assert all(float(row[4]) != 0.5 for row in tables[2][1:])
    for row in rows:
        assert row[2] == "a"
        assert float(row[3]) == float(row[1].split()[:1] == ["a"])
    figures = accumulator.Images("critic/value_against_reward")
    assert [image.step for image in figures] == [0, 2]
    assert figures[0].encoded_image_string.startswith(b"\x89PNG")


def test_looking_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([SampleLog(every_n_iterations=3)], []):
        module = sppo(tmp_path)
        chain = [*stages(), *callbacks]
        trainer_of(chain, logger=TensorBoardLogger(tmp_path)).fit(module, datamodule=data())
        runs.append(weights(module))
    assert torch.equal(*runs)


def test_without_a_critic_there_is_no_value_and_no_figure(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = sppo(tmp_path)
    module.prompt_values = lambda prompts: None  # type: ignore[method-assign]
    trainer_of([*stages(), SampleLog()], logger=logger).fit(module, datamodule=data())
    accumulator = events(logger)
    assert shown(accumulator)[0][0] == ["prompt", "response", "gold", "reward", "finish reason"]
    assert accumulator.Tags()["images"] == []


def test_without_tensorboard_it_says_so_once_and_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = sppo(tmp_path)
    module.prompt_values = pytest.fail  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        chain = [*stages(), SampleLog(every_n_iterations=1)]
        trainer_of(chain, logger=CSVLogger(tmp_path)).fit(module, datamodule=data(()))
    told = [record.getMessage() for record in caplog.records if "SampleLog" in record.getMessage()]
    assert told == ["SampleLog writes to TensorBoard only, and `trainer.logger` has no TensorBoardLogger."]


def test_supervised_learning_is_left_in_peace(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer_of([*stages(), SampleLog()], logger=logger).fit(sft(), datamodule=data())
    assert events(logger).Tags()["images"] == []


HOSTILE = (
    "<script>alert(1)</script> | a | b |\n# Title *bold* `code` [x](javascript:y) ![](z) _i_ &lt; \\| <b>ö</b>"
)


def test_hostile_text_is_shown_and_not_read() -> None:
    rollouts = rollouts_of([HOSTILE])
    rollouts.scores["judge"] = Scores(torch.tensor([0.25]), 1.0, "outcome")
    html = markdown_to_safe_html(sample_table(rollouts, torch.tensor([0.75]), 1, 1000))
    cells = Cells(html)
    assert cells.rows[1] == ["2+3=", HOSTILE, "5", "0.25", "0.75", "stop"]
    assert cells.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}


def test_characters_that_do_not_print_are_replaced() -> None:
    assert escape("a\x00b\x1b\u202ec\ud800d\té") == "a\ufffdb\ufffd\ufffdc\ufffdd\té"
    assert escape("") == ""
    assert escape("1+1\n\n=2") == "1&#43;1<br><br>&#61;2"
    escape("\ud800").encode()


def test_long_text_loses_its_middle() -> None:
    assert shorten("0123456789", 10) == "0123456789"
    assert shorten("0123456789", 5) == "01 … [5 characters left out] … 789"


def test_the_table_is_spread_over_the_batch_and_names_missing_verdicts() -> None:
    rollouts = rollouts_of([str(i) for i in range(8)])
    rollouts.scores["judge"] = Scores(torch.tensor([1.0, torch.nan] * 4), 1.0, "outcome")
    lines = sample_table(rollouts, None, 4, 100).splitlines()[2:]
    assert [re.split(r" \| ", line)[1] for line in lines] == ["0", "2", "4", "6"]
    [line] = sample_table(rollouts.rows([1]), None, 4, 100).splitlines()[2:]
    assert line == "| 2&#43;3&#61; | 1 | 5 | no verdict | stop |"


@pytest.mark.parametrize("name", ["every_n_iterations", "samples", "max_characters"])
def test_a_setting_that_shows_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"`SampleLog\.{name}`=0 shows nothing; use 1 or more\."):
        SampleLog(**{name: 0})
