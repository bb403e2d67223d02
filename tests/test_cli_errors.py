import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppo_lightning.cli import main

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "sppo_lightning.SPPOModule",
        "init_args": {
            "policy": {
                "class_path": "sppo_lightning.models.CausalLMPolicy",
                "init_args": {"pretrained": "./nowhere"},
            },
            "critic": {
                "class_path": "sppo_lightning.models.PromptCritic",
                "init_args": {"pretrained": "./nowhere"},
            },
        },
    },
    "data": {
        "class_path": "sppo_lightning.data.PromptDataModule",
        "init_args": {
            "train": {"class_path": "sppo_lightning.data.PromptFile", "init_args": {"path": "train.jsonl"}},
            "validation": {
                "easy": {"class_path": "sppo_lightning.data.PromptFile", "init_args": {"path": "easy.jsonl"}}
            },
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [
            {
                "class_path": "sppo_lightning.callbacks.RolloutGeneration",
                "init_args": {"sampling": {"temperature": 0.6}},
            },
            {"class_path": "sppo_lightning.callbacks.ExactMatch"},
        ],
    },
}
MODEL, DATA, CALLBACKS = ["model", "init_args"], ["data", "init_args"], ["trainer", "callbacks"]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """What the command line says about an argument list that it refuses with status 2, on one line."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        assert exit_.value.code == 2
        said = capsys.readouterr().err.rstrip("\n")
        last = said.split("\n")[-1]
        assert last.startswith("error: ")
        assert not any(word in said for word in ("usage", "Traceback", "Union"))
        return last.removeprefix("error: ")

    return run


def changed(path: list[Any], value: Any) -> str:
    """The config with another value at `path`, as a file in the current folder."""
    config = node = copy.deepcopy(CONFIG)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return "config.yaml"


KEYS = [
    (["trainer", "max_step"], "`trainer.max_step` is not a setting of fit; the nearest is `trainer.max_steps`."),
    (["thread"], "`thread` is not a setting of fit; the nearest is `threads`."),
    (
        [*MODEL, "mini_batchsize"],
        "`mini_batchsize` is not a setting of sppo_lightning.SPPOModule (in `model`); the nearest is `mini_batch_size`.",
    ),
    (
        [*MODEL, "policy", "init_args", "pretraind"],
        "`pretraind` is not a setting of sppo_lightning.models.CausalLMPolicy (in `model.policy`); the nearest is `pretrained`.",
    ),
    (
        [*MODEL, "policy_optimizer"],  # a group of settings that is no class path
        "`learn_rate` is not a setting of `policy_optimizer` of sppo_lightning.SPPOModule (in `model`); there are `lr`, "
        "`weight_decay`, `betas`, `max_grad_norm`, `warmup_updates`.",
    ),
    (
        [*DATA, "batchsize"],
        "`batchsize` is not a setting of sppo_lightning.data.PromptDataModule (in `data`); the nearest is `batch_size`.",
    ),
    (
        [*DATA, "validation", "easy", "init_args", "splits"],
        "`splits` is not a setting of sppo_lightning.data.PromptFile (in `data.validation`); the nearest is `split`.",
    ),
    (
        [*CALLBACKS, 0, "init_args", "sampling", "temprature"],
        "`temprature` is not a setting of `sampling` of sppo_lightning.callbacks.RolloutGeneration (in "
        "`trainer.callbacks`); the nearest is `temperature`.",
    ),
    (
        [*CALLBACKS, 1, "weight"],
        "`trainer.callbacks` has settings beside a `class_path`; a component's settings go under `init_args`.",
    ),
    (
        [*CALLBACKS, 0, "greedy"],
        "`trainer.callbacks` has `greedy` beside its `class_path`; a component's settings go under `init_args`.",
    ),
    (
        ["model", "init_arg"],
        "`model` has `init_arg` beside its `class_path`; the nearest is `init_args`.",
    ),
]


@pytest.mark.parametrize(("path", "said"), KEYS, ids=[".".join(map(str, path)) for path, _ in KEYS])
def test_an_unknown_key_and_the_nearest(refused: Callable[..., str], path: list[Any], said: str):
    value = {"learn_rate": 1} if path[-1] == "policy_optimizer" else 1
    assert refused("fit", "--config", changed(path, value)) == said


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            [*CALLBACKS, 1],
            "sppo_lightning.callbacks.ExactMach",
            "`class_path`=sppo_lightning.callbacks.ExactMach (in `trainer.callbacks`) does not exist; the nearest is "
            "sppo_lightning.callbacks.ExactMatch.",
        ),
        (
            [*CALLBACKS, 1],
            "sppo_lightning.callback.ExactMatch",
            "`class_path`=sppo_lightning.callback.ExactMatch (in `trainer.callbacks`) does not exist; the nearest is "
            "sppo_lightning.callbacks.ExactMatch.",
        ),
        (
            [*CALLBACKS, 1],
            "sppo_lightning.models.PromptCritic",
            "`class_path`=sppo_lightning.models.PromptCritic is not a Callback, which `trainer.callbacks` takes; use one "
            "such as sppo_lightning.callbacks.CompletionWriter.",
        ),
        (
            ["model"],
            "sppo_lightnin.SPPOModule",
            "`class_path`=sppo_lightnin.SPPOModule (in `model`) does not exist; the nearest is sppo_lightning.SPPOModule.",
        ),
        (
            [*MODEL, "advantage"],
            "SequenceAdvantag",
            "`class_path`=SequenceAdvantag (in `model.advantage`) does not exist; the nearest is "
            "sppo_lightning.advantages.SequenceAdvantage.",
        ),
        (
            [*MODEL, "advantage"],
            "sppo_lightning.advantages.Advantage",
            "`class_path`=sppo_lightning.advantages.Advantage in `model.advantage` is a base class alone; use one of its "
            "subclasses, such as sppo_lightning.advantages.GroupAdvantage.",
        ),
        (
            [*CALLBACKS, 1],
            "broken_verifiers.Length",
            "`broken_verifiers.Length` (in `trainer.callbacks`) cannot be imported, because there is no module named "
            "'not_installed'.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_class_path_that_leads_nowhere(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, path: list[Any], value: str, said: str
):
    Path("broken_verifiers.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(Path.cwd())
    assert refused("fit", "--config", changed(path, {"class_path": value})) == said


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["trainer", "max_steps"], "many", "`trainer.max_steps`=many must be a whole number."),
        (
            [*MODEL, "mini_batch_size"],
            "many",
            "`mini_batch_size`=many of sppo_lightning.SPPOModule (in `model`) must be a whole number or null.",
        ),
        (
            [*MODEL, "lr_schedule"],
            "cosin",
            "`lr_schedule`=cosin of sppo_lightning.SPPOModule (in `model`) must be one of constant, linear, cosine; the "
            "nearest is cosine.",
        ),
        (
            [*DATA, "train"],
            3,
            "`train`=3 of sppo_lightning.data.PromptDataModule (in `data`) must be text, the `class_path` (and "
            "`init_args`) of a PromptSource or null.",
        ),
        ([*CALLBACKS, 1], 3, "`trainer.callbacks`=3 must be the `class_path` (and `init_args`) of a Callback."),
    ],
)
def test_a_value_of_the_wrong_type(refused: Callable[..., str], path: list[Any], value: Any, said: str):
    assert refused("fit", "--config", changed(path, value)) == said


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (MODEL, {}, "sppo_lightning.SPPOModule (in `model`) needs `policy`, which is not set; add it."),
        (["model"], None, "`model` is not set; name a config with `--config`."),
        (
            [*CALLBACKS, 1],
            {"class_path": "sppo_lightning.callbacks.HFExport"},
            "sppo_lightning.callbacks.HFExport (in `trainer.callbacks`) needs `path`, which is not set; add it.",
        ),
    ],
    ids=["policy", "model", "path"],
)
def test_a_required_setting_that_is_missing(refused: Callable[..., str], path: list[Any], value: Any, said: str):
    assert refused("fit", "--config", changed(path, value)) == said


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            [*CALLBACKS, 0, "init_args", "sampling", "top_p"],  # within a callback of a list
            3,
            "`top_p`=3.0 of the sampling settings cannot be used; it must be above 0 and at most 1.",
        ),
        (
            [*DATA, "train", "init_args", "limit"],  # after the `str` of a choice of types was tried
            0,
            "`limit`=0 of train.jsonl leaves no row; use 1 or more, or leave it out.",
        ),
        ([*DATA, "batch_size"], 0, "`batch_size`=0 leaves no prompt; use 1 or more."),
        (
            [*MODEL, "critic"],
            None,
            "`advantage`=SequenceAdvantage needs a critic; set `model.critic` to sppo_lightning.models.PromptCritic, "
            "which reads the prompt alone.",
        ),
        (["threads"], 0, "`threads`=0 leaves no thread to compute with; use 1 or more."),
    ],
    ids=["callback", "source", "data", "model", "process"],
)
def test_what_a_component_refuses(refused: Callable[..., str], path: list[Any], value: Any, said: str):
    assert refused("fit", "--config", changed(path, value)) == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            [],
            "Say which of fit, validate, test, predict, export to run, as in `python -m sppo_lightning fit --config …`.",
        ),
        (["fitt"], "`fitt` is not a command; the nearest is `fit`."),
        (["fit", "--confg", "x"], "`--confg` is not an argument of fit; the nearest is `--config`."),
        (["fit", "--config=rn.yaml"], "`--config`=rn.yaml does not exist; the nearest is run.yaml."),
        (
            ["fit", "--config", "run.yaml"],
            "`--config`=run.yaml is not valid YAML in line 2, column 2: did not find expected ',' or ']'.",
        ),
        (
            ["fit", "-c", "list.yaml"],
            "`--config`=list.yaml holds no settings by name; write `model:`, `data:` and `trainer:` with theirs.",
        ),
        (
            ["fit", "--config=empty.yaml"],
            "`--config`=empty.yaml holds no settings by name; write `model:`, `data:` and `trainer:` with theirs.",
        ),
    ],
    ids=["no command", "command", "argument", "missing file", "invalid YAML", "list", "empty"],
)
def test_a_command_line_that_cannot_be_read(refused: Callable[..., str], arguments: list[str], said: str):
    Path("run.yaml").write_text("a: [1, 2\nb: }")
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("empty.yaml").touch()
    assert refused(*arguments) == said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--threds=3", "`--threds` is not an argument of fit; the nearest is `--threads`."),
        (
            "--model.mini_batchsize=3",
            "`mini_batchsize` is not a setting of sppo_lightning.SPPOModule (in `model`); the nearest is `mini_batch_size`.",
        ),
    ],
)
def test_an_unknown_argument_beside_a_config(refused: Callable[..., str], argument: str, said: str):
    assert refused("fit", "--config", changed(["seed_everything"], 1), argument) == said
