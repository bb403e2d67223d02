import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from test_cli_errors import CONFIG, DATA, MODEL, changed
from tiny_config import write_files

from sppo_lightning.cli import command_line, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_printed_config_runs_unchanged(
    capsys: pytest.CaptureFixture[str],
):
    short = [
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=1",
        "--data.batch_size=4",
        "--data.validation_batch_size=2",
    ]
    first = printed(capsys, "fit", "--config", str(ROOT / "configs/quickstart/sft.yaml"), *short, "--print_config")
    Path("printed.yaml").write_text(first)
    assert printed(capsys, "fit", "--config", "printed.yaml", "--print_config") == first
    assert yaml.safe_load(first)["model"]["init_args"]["optimizer"]["betas"] == [0.9, 0.99]
    main(["fit", "--config", "printed.yaml"])
    assert Path("runs/quickstart/warm_start/model/model.safetensors").is_file()


def test_help_shows_a_class_with_its_docstring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "200")
    module = printed(capsys, "fit", "--model.help", "sppo_lightning.SPPOModule")
    assert "--model.micro_batch_tokens" in module
    assert (
        "Token budget of one forward and backward on one rank, padding included. (type: int, default: 16384)"
        in module
    )
    assert "The policy that is trained" not in module
    assert "Peak learning rate. (type: float, default: 1e-06)" in module
    settings = printed(capsys, "fit", "--help")
    assert all(name in settings for name in ("--trainer.max_steps", "--threads", "--model.help", "--data.help"))
    assert "CPU threads of one process" in settings


PUBLIC = {
    getattr(module, name)
    for module in map(
        import_module,
        ["sppo_lightning", *(f"sppo_lightning.{part}" for part in ("callbacks", "data", "engines", "models"))],
    )
    for name in module.__all__
} | {
    found
    for part in ("advantages", "objectives", "optim")
    for found in vars(import_module(f"sppo_lightning.{part}")).values()
    if inspect.isclass(found) and found.__module__ == f"sppo_lightning.{part}"
}


@pytest.mark.parametrize(
    "component", sorted(filter(lambda c: not inspect.isabstract(c), PUBLIC), key=lambda c: c.__name__)
)
def test_every_setting_has_a_help_text(component: type):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(component, fail_untyped=False)
    assert [action.dest for action in parser._actions if not (action.help or "").strip()] == []


def test_validate_and_test_print_a_column_per_data_set(capsys: pytest.CaptureFixture[str]):
    sets = {"first": "train.jsonl", "second": "other.jsonl"}
    changes = {"data.init_args.validation": sets, "data.init_args.test": {"third": "train.jsonl"}}
    write_files(changes)
    Path("other.jsonl").write_text(Path("train.jsonl").read_text().replace("a b", "b a"))
    for command, columns in (("validate", ["metric", "first", "second", "all"]), ("test", ["metric", "third"])):
        main([command, "--config", "config.yaml"])
        lines = [
            [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.split("\n")
        ]
        assert columns in lines
        (rates,) = [cells[1:] for cells in lines if cells[:1] == ["avg@4"]]  # of one problem
        assert len(rates) == len(columns) - 1
        assert all(0 <= float(rate) <= 1 for rate in rates)
        assert "DataLoader" not in str(lines)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        command_line(["--config", changed(["threads"], before + 1)], run=False)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("content", ["prompt,answer\na,b\n", "", "model: {}\n"])
def test_a_data_file_is_a_path_and_not_a_config(content: str):
    Path("train.csv").write_text(content)
    cli = command_line(["--config", changed([*DATA, "train"], "train.csv")], run=False)
    assert cli.datamodule.train == "train.csv"


def test_a_component_may_stand_in_a_file_of_its_own():
    Path("policy.yaml").write_text(yaml.safe_dump(CONFIG["model"]["init_args"]["policy"]))
    cli = command_line(["--config", changed([*MODEL, "policy"], "policy.yaml")], run=False)
    assert cli.model.policy.pretrained == "./nowhere"
