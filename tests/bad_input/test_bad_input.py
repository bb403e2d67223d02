"""Each kind of bad input through the command line: one sentence on stderr, status 2, no traceback."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import Verifier
from sppo_lightning.cli import main
from sppo_lightning.models.tiny import word_tokenizer

WORDS = "a b c d"
TINY = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
}
ROLLOUT = {
    "class_path": "sppo_lightning.callbacks.RolloutGeneration",
    "init_args": {"sampling": {"max_new_tokens": 2}},
}
EXACT = {"class_path": "sppo_lightning.callbacks.ExactMatch", "init_args": {"extract": "whole"}}
CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "sppo_lightning.SPPOModule",
        "init_args": {
            "policy": {
                "class_path": "sppo_lightning.models.CausalLMPolicy",
                "init_args": {"tokenizer": "./tokenizer", "config": {**TINY, "vocab_size": 7}},
            },
            "critic": {
                "class_path": "sppo_lightning.models.PromptCritic",
                "init_args": {"tokenizer": "./critic", "config": TINY},
            },
        },
    },
    "data": {
        "class_path": "sppo_lightning.data.PromptDataModule",
        "init_args": {"train": "train.jsonl", "batch_size": 4, "shuffle": False},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [ROLLOUT, EXACT],
    },
}
GOOD = [{"prompt": "a b", "answer": "c"}] * 4
MODEL, DATA, TRAIN = "model.init_args.", "data.init_args.", "data.init_args.train"


class OneForAll(Verifier):
    """Gives one score to a whole batch."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [1.0]


class Gives(Verifier):
    """Gives every response the same score."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [self.value] * len(responses)


def gives(value: float) -> dict[str, Any]:
    return {"class_path": f"{__name__}.Gives", "init_args": {"value": value}}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        node = config
        *keys, last = path.split(".")
        for key in keys:
            node = node[key]
        node[last] = value
    return config


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run `fit` on training rows, with the config changed at dotted paths."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    Path("critic").mkdir()
    word_tokenizer(WORDS.split()).save_pretrained("critic")

    def run(changes: dict[str, Any], rows: list[Any] = GOOD, tokenizer: dict[str, Any] | None = None) -> None:
        Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = word_tokenizer(WORDS.split())
        for name, value in (tokenizer or {}).items():
            setattr(made, name, value)
        made.save_pretrained("tokenizer")
        Path("config.yaml").write_text(yaml.safe_dump(changed(changes)))
        main(["fit", "--config", "config.yaml"])

    return run


def refusal(fit: Callable[..., None], capsys: pytest.CaptureFixture[str], *case: Any) -> str:
    with pytest.raises(SystemExit) as exit_:
        fit(*case)
    assert exit_.value.code == 2
    said = capsys.readouterr().err.rstrip("\n").split("\n")
    assert not any("Traceback" in line or line.startswith("usage") for line in said)
    assert said[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in said) == 1
    return said[-1].removeprefix("error: ").replace(str(Path.cwd()), "<here>")


def test_the_same_without_a_mistake_runs(fit: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    fit({})
    assert "error: " not in capsys.readouterr().err


OF_THE_DATA = {
    "no such file": (
        {TRAIN: "trian.jsonl"},
        GOOD,
        "`path`=trian.jsonl does not exist in <here>, the nearest is train.jsonl.",
    ),
    "no such column": (
        {
            TRAIN: {
                "class_path": "sppo_lightning.data.PromptFile",
                "init_args": {"path": "train.jsonl", "columns": {"answer": "gold"}},
            }
        },
        GOOD,
        "train.jsonl has no column gold (`columns` maps answer to gold), only prompt, answer; name the right one in `columns`.",
    ),
    "no such split": (
        {
            TRAIN: {
                "class_path": "sppo_lightning.data.PromptFile",
                "init_args": {"path": "train.jsonl", "split": "dev"},
            }
        },
        GOOD,
        "`split`=dev is not in train.jsonl, which has train.",
    ),
    "empty": ({}, [], "train.jsonl holds no rows; give a source with at least one prompt."),
    "no messages": (
        {},
        [*GOOD, {"prompt": [], "answer": "c"}],
        "train.jsonl has 1 unusable row, counted from 0 (row 4: prompt holds no messages); mend or remove them, or set "
        "`on_bad_row` to skip.",
    ),
    "no gold": (
        {},
        [*GOOD, {"prompt": "a", "answer": None}],
        "train.jsonl has 1 unusable row, counted from 0 (row 4: no gold answer in answer); mend or remove them, or set "
        "`on_bad_row` to skip.",
    ),
}


@pytest.mark.parametrize("case", OF_THE_DATA)
def test_data(fit: Callable[..., None], capsys: pytest.CaptureFixture[str], case: str):
    changes, rows, sentence = OF_THE_DATA[case]
    assert refusal(fit, capsys, changes, rows) == sentence
    assert len(Path("train.jsonl").read_text().splitlines()) == len(rows)


OF_A_VERIFIER = {
    "one for all": (
        {"class_path": f"{__name__}.OneForAll"},
        "Verifier 'one_for_all' returned 1 scores for 4 responses; return one for each, `None` for no verdict.",
    ),
    "above 1": (
        gives(1.5),
        "Verifier 'gives' gave 1.5 to a response to row 0 of 'train'; return a number in [0, 1], or set `role: shaping`, or "
        "`None` for no verdict.",
    ),
    "NaN": (
        gives(float("nan")),
        "Verifier 'gives' gave nan to a response to row 0 of 'train'; return a number in [0, 1] or `None` for no verdict.",
    ),
}


@pytest.mark.parametrize("case", OF_A_VERIFIER)
def test_a_verifiers_scores(fit: Callable[..., None], capsys: pytest.CaptureFixture[str], case: str):
    verifier, sentence = OF_A_VERIFIER[case]
    assert refusal(fit, capsys, {"trainer.callbacks": [ROLLOUT, verifier]}) == sentence


OF_THE_SETTINGS = {
    "no rollouts": (
        {"trainer.callbacks": [EXACT]},
        "`trainer.callbacks` has no stage that provides the rollouts that ExactMatch needs; add "
        "sppo_lightning.callbacks.RolloutGeneration to it above ExactMatch.",
    ),
    "no verifier": (
        {"trainer.callbacks": [ROLLOUT]},
        "`trainer.callbacks` has no stage that provides the scores that the module needs; add a verifier such as "
        "sppo_lightning.callbacks.MathVerifier to it.",
    ),
    "wrong order": (
        {"trainer.callbacks": [EXACT, ROLLOUT]},
        "`trainer.callbacks` lists ExactMatch before RolloutGeneration, which provides the rollouts that it needs; move "
        "RolloutGeneration above ExactMatch.",
    ),
    "mini-batch size": (
        {MODEL + "mini_batch_size": 3},
        "`mini_batch_size`=3 does not divide the 4 sequences of an iteration; use 2 or 4.",
    ),
    "gradient clip": (
        {"trainer.gradient_clip_val": 1.0},
        "`trainer.gradient_clip_val`=1.0 does not apply here; remove it and set `max_grad_norm` of "
        "`model.policy_optimizer` and `model.critic_optimizer` instead.",
    ),
    "accumulation": (
        {"trainer.accumulate_grad_batches": 2},
        "`trainer.accumulate_grad_batches`=2 does not apply here; remove it and set `micro_batch_tokens` on `model` instead.",
    ),
    "class path": (
        {"trainer.callbacks": [ROLLOUT, {"class_path": "sppo_lightning.callbacks.ExactMatches"}]},
        "`class_path`=sppo_lightning.callbacks.ExactMatches (in `trainer.callbacks`) does not exist; the nearest is "
        "sppo_lightning.callbacks.ExactMatch.",
    ),
    "key": (
        {DATA + "batch_sise": 4},
        "`batch_sise` is not a setting of sppo_lightning.data.PromptDataModule (in `data`); the nearest is `batch_size`.",
    ),
}


@pytest.mark.parametrize("case", OF_THE_SETTINGS)
def test_settings(fit: Callable[..., None], capsys: pytest.CaptureFixture[str], case: str):
    changes, sentence = OF_THE_SETTINGS[case]
    assert refusal(fit, capsys, changes) == sentence


def test_a_tokenizer_without_an_end_of_sequence_token(fit: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    assert refusal(fit, capsys, {}, GOOD, {"eos_token": None}) == (
        "The tokenizer of `model.policy.tokenizer`='./tokenizer' has no end-of-sequence token, so no response could stop; "
        "set `eos_token` in its tokenizer_config.json."
    )


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_and_says_so(fit: Callable[..., None]):
    sentence = (
        r"The tokenizer of `model\.policy\.tokenizer`='\./tokenizer' has no pad token; its end-of-sequence token '<eos>' is "
        "used for padding, which the masks leave out"
    )
    with pytest.warns(UserWarning, match=sentence):
        fit({}, GOOD, {"pad_token": None})
