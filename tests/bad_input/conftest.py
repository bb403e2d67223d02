"""Each kind of bad input through the command line: one sentence on stderr, status 2, no traceback."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_config import GOOD, write_files

from sppo_lightning.cli import main


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run `fit` on training rows, with the config changed at dotted paths and with more arguments."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)

    def run(
        changes: dict[str, Any] | None = None,
        rows: list[Any] = GOOD,
        tokenizer: dict[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        write_files(changes or {}, rows, tokenizer)
        main(["fit", "--config", "config.yaml", *arguments])

    return run


@pytest.fixture
def refused(fit: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `fit` says, in one sentence, about what it refuses with status 2."""

    def run(*case: Any, **settings: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            fit(*case, **settings)
        assert exit_.value.code == 2
        said = capsys.readouterr().err.rstrip("\n").split("\n")
        assert not any("Traceback" in line or line.startswith("usage") for line in said)
        assert said[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in said) == 1
        return said[-1].removeprefix("error: ").replace(str(Path.cwd()), "<here>")

    return run
