import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from sppo_lightning.config_files import as_text, merge, read, split_arguments, with_unknown_as_null
from sppo_lightning.errors import InputError

ROLLOUT = {
    "class_path": "sppo_lightning.callbacks.RolloutGeneration",
    "init_args": {"sampling": {"temperature": 0.6, "max_new_tokens": 8}, "greedy": True},
}
EXACT = {"class_path": "sppo_lightning.callbacks.ExactMatch"}
EASY = {"class_path": "sppo_lightning.callbacks.ExactMatch", "init_args": {"name": "easy", "weight": 1.0}}
HARD = {"class_path": "sppo_lightning.callbacks.ExactMatch", "init_args": {"name": "hard", "weight": 2.0}}
MATH = {"class_path": "sppo_lightning.callbacks.MathVerifier"}
SAMPLES = {"class_path": "sppo_lightning.callbacks.SampleLog"}
CHECKPOINT = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
TIMER = {"class_path": "lightning.pytorch.callbacks.Timer"}


def component(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def callbacks(*lists: Any) -> Any:
    return merge([{"trainer": {"callbacks": entries}} for entries in lists])["trainer"]["callbacks"]


MERGES: dict[str, tuple[list[Any], Any]] = {
    "mappings key by key": (
        [{"trainer": {"max_steps": 1, "precision": 16}}, {"trainer": {"max_steps": 2}, "threads": 1}],
        {"trainer": {"max_steps": 2, "precision": 16}, "threads": 1},
    ),
    "null replaces, and is replaced": (
        [{"a": {"b": 1}, "c": None, "d": None}, {"a": None, "c": {"e": 2}}],
        {"a": None, "c": {"e": 2}, "d": None},
    ),
    "lists are replaced": ([{"betas": [0.9, 0.999], "n": 1}, {"betas": [0.5]}], {"betas": [0.5], "n": 1}),
    "a component of the same class": (
        [
            {"critic": component("sppo_lightning.models.PromptCritic", pretrained="x", lr=1)},
            {"critic": component("sppo_lightning.models.critic.PromptCritic", lr=2)},  # the same by its module
        ],
        {"critic": component("sppo_lightning.models.critic.PromptCritic", pretrained="x", lr=2)},
    ),
    "a component of another class": (
        [{"critic": component("m.Large", lr=1, layers=2)}, {"critic": component("m.Small", lr=2)}],
        {"critic": component("m.Small", lr=2)},
    ),
    "a part without a class": (
        [
            {"critic": component("m.Large", lr=1, layers={"n": 2, "m": 3})},
            {"critic": {"init_args": {"layers": {"n": 4}}}},
        ],
        {"critic": component("m.Large", lr=1, layers={"n": 4, "m": 3})},
    ),
    "a class for a part without one": (
        [{"critic": {"init_args": {"lr": 1}}}, {"critic": {"class_path": "m.Large"}}],
        {"critic": component("m.Large", lr=1)},
    ),
    "three files": ([{"a": 1, "b": 1, "c": 1}, {"b": 2, "c": 2}, {"c": 3}], {"a": 1, "b": 2, "c": 3}),
    "one file": ([{"a": {}, "b": [1]}], {"a": {}, "b": [1]}),
    "a logger for a list of loggers": (
        [
            {"trainer": {"logger": [component("m.CSV", path="x")]}},
            {"trainer": {"logger": component("m.CSV", name="y")}},
        ],
        {"trainer": {"logger": [component("m.CSV", path="x", name="y")]}},
    ),
    "no logger": (
        [{"trainer": {"logger": [component("m.CSV")]}}, {"trainer": {"logger": False}}],
        {"trainer": {"logger": False}},
    ),
    "another list of components": (
        [{"trainer": {"plugins": [component("m.A")]}}, {"trainer": {"plugins": [component("m.B")]}}],
        {"trainer": {"plugins": [component("m.B")]}},
    ),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge(case: str):
    configs, expected = MERGES[case]
    before = copy.deepcopy(configs)
    assert merge(configs) == expected
    assert configs == before


CALLBACKS: dict[str, tuple[list[Any], Any]] = {
    "into the one of the same class, in its place": (
        [[ROLLOUT, EXACT, SAMPLES], [component(ROLLOUT["class_path"], sampling={"samples_per_prompt": 4})]],
        [
            component(
                ROLLOUT["class_path"],
                sampling={"temperature": 0.6, "max_new_tokens": 8, "samples_per_prompt": 4},
                greedy=True,
            ),
            EXACT,
            SAMPLES,
        ],
    ),
    "a new stage behind the last one": (
        [[TIMER, ROLLOUT, EXACT, SAMPLES, CHECKPOINT], [MATH]],
        [TIMER, ROLLOUT, EXACT, MATH, SAMPLES, CHECKPOINT],
    ),
    "two new stages in their order": ([[ROLLOUT, SAMPLES], [MATH, EXACT]], [ROLLOUT, MATH, EXACT, SAMPLES]),
    "anything else at the end": ([[ROLLOUT, EXACT, SAMPLES], [TIMER]], [ROLLOUT, EXACT, SAMPLES, TIMER]),
    "stages where there were none": ([[TIMER], [ROLLOUT, EXACT]], [TIMER, ROLLOUT, EXACT]),
    "the one of the same name": (
        [[ROLLOUT, EASY, HARD], [component(EXACT["class_path"], name="hard", weight=5.0)]],
        [ROLLOUT, EASY, component(EXACT["class_path"], name="hard", weight=5.0)],
    ),
    "another name is another item": (
        [[ROLLOUT, EASY, SAMPLES], [HARD]],
        [ROLLOUT, EASY, HARD, SAMPLES],
    ),
    "no name goes into the first": (
        [[ROLLOUT, EASY, HARD], [component(EXACT["class_path"], weight=5.0)]],
        [ROLLOUT, component(EXACT["class_path"], name="easy", weight=5.0), HARD],
    ),
    "an item takes one": (
        [
            [CHECKPOINT],
            [component(CHECKPOINT["class_path"], monitor="a"), component(CHECKPOINT["class_path"], monitor="b")],
        ],
        [
            component(CHECKPOINT["class_path"], save_last=True, monitor="a"),
            component(CHECKPOINT["class_path"], monitor="b"),
        ],
    ),
    "class paths alone, short ones too": (
        [[ROLLOUT, SAMPLES], ["ExactMatch", "Timer"]],
        [ROLLOUT, {"class_path": "ExactMatch"}, SAMPLES, {"class_path": "Timer"}],
    ),
    "null takes all away": ([[ROLLOUT, EXACT], None], None),
    "where there were none": ([None, [ROLLOUT]], [ROLLOUT]),
    "a class that is not there": (
        [[ROLLOUT, EXACT], [{"class_path": "no.Where"}]],
        [ROLLOUT, EXACT, {"class_path": "no.Where"}],
    ),
}


@pytest.mark.parametrize("case", CALLBACKS)
def test_merge_of_callbacks(case: str):
    lists, expected = CALLBACKS[case]
    assert callbacks(*lists) == expected


VALUES = {
    "lr": 1e-6,
    "text that looks like a number": "1e-3",
    "clip": math.inf,
    "nothing": None,
    "empty": {},
    "none": [],
    "flag": True,
    "text that looks like a flag": "on",
    "time": "00:00:02:00",
    "date": "2024-01-01",
    3: "a number for a key",
    "lines": "a\n  b: é\n",
    "nested": [{"a": [1, 2.5]}],
}


def test_values_survive_as_what_they_are():
    found = get_loader("yaml")(as_text(VALUES))
    assert found == VALUES
    assert [type(value) for value in found.values()] == [type(value) for value in VALUES.values()]


def test_numbers_are_read_as_the_parser_reads_them(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: 2E5\nc: .5\nd: '1e-3'\ne: 2024-01-01\n")
    assert read(str(tmp_path / "a.yaml")) == {"a": 0.001, "b": 200_000.0, "c": 0.5, "d": "1e-3", "e": "2024-01-01"}
    assert yaml.safe_load("1e-3") == "1e-3"  # what YAML 1.1 would say


def test_a_file_of_nulls_and_yaml_as_an_argument(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer:\n")
    assert read(str(tmp_path / "a.yaml")) == {"trainer": None}
    assert read("{trainer: {max_steps: 3}}") == {"trainer": {"max_steps": 3}}
    with pytest.raises(InputError, match=r"`--config`=\{trainer: is not valid YAML in line 2, column 1: "):
        read("{trainer:")


def test_a_component_in_a_file_beside_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/critic.yaml").write_text("class_path: m.Large\ninit_args: {lr: 1.0, config: deep.yaml}")
    (tmp_path / "configs/deep.yaml").write_text("layers: 2")
    (tmp_path / "configs/a.yaml").write_text("critic: critic.yaml\nother: missing.yaml\n")
    monkeypatch.chdir(tmp_path)
    first = read("configs/a.yaml")
    assert first == {"critic": "configs/critic.yaml", "other": "missing.yaml"}
    assert merge([first, {"critic": {"init_args": {"lr": 2.0}}}])["critic"] == component(
        "m.Large", lr=2.0, config="configs/deep.yaml"
    )


@pytest.mark.parametrize(
    ("arguments", "names", "others"),
    [
        (["fit", "--config", "a", "--x=1", "--config=b"], ["a", "b"], ["fit", "--x=1"]),
        (["--config", "a", "fit", "-c", "b", "-c=c", "-cd"], ["a", "b", "c", "d"], ["fit"]),
        (
            ["fit", "--x", "1", "--configs=a", "--print_config"],
            [],
            ["fit", "--x", "1", "--configs=a", "--print_config"],
        ),
        (["fit", "--config=a: 1\nb: =2"], ["a: 1\nb: =2"], ["fit"]),
        (["fit", "--config"], [], ["fit", "--config"]),
    ],
)
def test_configs_are_told_from_other_arguments(arguments: list[str], names: list[str], others: list[str]):
    assert split_arguments(arguments) == (names, others)


def test_an_empty_mapping_is_seen_where_it_is_no_setting():
    critic = component("sppo_lightning.models.PromptCritic", config={}, confg={})
    config = {"model": critic, "trainer": {"logger": {}, "foo": {}}, "foo": {}, "threads": {}, "list": [critic]}
    known = ["model", "trainer.logger", "threads", "list"]
    seen = component("sppo_lightning.models.PromptCritic", config={}, confg=None)
    assert with_unknown_as_null(config, known) == {
        "model": seen,
        "trainer": {"logger": {}, "foo": None},
        "foo": None,
        "threads": {},
        "list": [seen],
    }
