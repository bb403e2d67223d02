"""Configs and data that were changed at random: the run ends well, or with one sentence, and in time."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from forked_cli import Outcome, run
from hypothesis import HealthCheck, Phase, given, settings
from mutations import CHANGES, WHOLE, configs, data
from tiny_config import write_files

from sppo_lightning.cli import main

FIT = ("fit", "--config=config.yaml")


def ran(*arguments: str, config: bytes | None = None, rows: bytes | None = None) -> Outcome:
    """The command on the files that work, but for what is given; it may not change what it reads."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_files({}, folder=folder)
        given = {"config.yaml": config or yaml.safe_dump(WHOLE).encode()} | (
            {} if rows is None else {"train.jsonl": rows}
        )
        for file, content in given.items():
            (folder / file).write_bytes(content)
        outcome = run(arguments, folder)
        assert all((folder / file).read_bytes() == content for file, content in given.items())
        return outcome


def check(outcome: Outcome) -> None:
    """It ended in time: well, or with status 2 and one sentence."""
    assert outcome.status in (0, 2), outcome.said
    assert "Traceback" not in outcome.said
    if outcome.status:
        assert outcome.sentence is not None, outcome.said
        assert re.fullmatch(r"\S.*[^.\s]\.", outcome.sentence), outcome.said


def few(count: int) -> Callable[..., None]:
    """The same examples every time, and no search for smaller ones, each of which takes a second."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the command imports on its way, once for all children."""
    folder = tmp_path_factory.mktemp("warm")
    write_files(CHANGES, folder=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sppo_lightning"])
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")  # what the command sets is undone
        main(FIT)


def test_what_is_changed_works_unchanged() -> None:
    outcome = ran(*FIT)
    assert outcome.status == 0, outcome.said


@few(8)
@given(config=configs())
def test_a_changed_config(config: bytes) -> None:
    check(ran(*FIT, config=config))


@few(6)
@given(config=configs())
def test_a_changed_config_is_parsed(config: bytes) -> None:
    check(ran(*FIT, "--print_config", config=config))


@few(6)
@given(rows=data())
def test_changed_data(rows: bytes) -> None:
    check(ran(*FIT, rows=rows))


@pytest.mark.slow
@few(30)
@given(config=configs(), rows=data())
def test_much_changed(config: bytes, rows: bytes) -> None:
    check(ran(*FIT, config=config))
    check(ran(*FIT, rows=rows))
