import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_config import GOOD, ROLLOUT

TRAIN = "data.init_args.train"
LONGEST = "data.init_args.max_prompt_tokens"
MATH = {"class_path": "sppo_lightning.callbacks.MathVerifier"}
MEND = "mend or remove them, or set `on_bad_row` to skip."
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
    "no such folder": (
        {TRAIN: "./nowhere"},
        GOOD,
        "`path`=nowhere does not exist in <here>, which has train.jsonl.",
    ),
    "another kind of file": (
        {TRAIN: "train.txt"},
        GOOD,
        "`path`=train.txt has an ending that is not read; use one of .parquet, .jsonl, .json, .csv.",
    ),
    "several splits": (
        {TRAIN: "tokenizer"},
        GOOD,
        "`path`=tokenizer has the splits tokenizer, tokenizer_config; set `split` to one of them.",
    ),
    "unknown columns": (
        {},
        [{"task": "a b", "gold": "c"}] * 4,
        "train.jsonl has the columns task, gold, which is none of the layouts messages, prompt_answer, gsm8k, trl, "
        "chat; say with `columns` which hold the prompt and the answer.",
    ),
    "empty": ({}, [], "train.jsonl holds no rows; give a source with at least one prompt."),
    "over-long": (
        {LONGEST: 1},
        GOOD,
        "`max_prompt_tokens`=1 leaves none of the 4 prompts of train.jsonl; raise it.",
    ),
    "fewer than a batch": (
        {},
        GOOD[:3],
        "`batch_size`=4 is more than the 3 training prompts, so there is no whole batch; use 3 or less.",
    ),
    "no chat template": (
        {"data.init_args.template": "chat"},
        GOOD,
        "`template`=chat needs a chat template, and the policy's tokenizer (./tokenizer) has none; use plain, or add a "
        "chat_template.jinja to the tokenizer.",
    ),
    "ids that repeat": (
        {},
        [{**row, "id": 7} for row in GOOD],
        "train.jsonl has 3 unusable rows, counted from 0 (rows 1, 2, 3: id repeats that of an earlier row); "
        + MEND,
    ),
}
OF_A_ROW = {  # a fifth one
    "no messages": ({"prompt": [], "answer": "c"}, "prompt holds no messages"),
    "no prompt": ({"prompt": " ", "answer": "c"}, "no prompt in prompt"),
    "a number for a prompt": ({"prompt": 3, "answer": "c"}, "prompt is of type int, not text or chat messages"),
    "half a character": (
        {"prompt": "\ud800", "answer": "c"},
        "prompt holds half of a surrogate pair, which is no character",
    ),
    "no gold": ({"prompt": "a", "answer": None}, "no gold answer in answer"),
    "a mapping for a gold": (
        {"prompt": "a", "answer": {"x": 1}},
        "the gold answer in answer is of type dict, not text or a number",
    ),
    "a gold that cannot be parsed": (
        {"prompt": "a", "answer": "\\frac{1"},
        "the gold answer '\\\\frac{1' cannot be read: a brace is never closed",
    ),
}


@pytest.mark.parametrize("case", OF_THE_DATA)
def test_data(refused: Callable[..., str], case: str):
    changes, rows, sentence = OF_THE_DATA[case]
    Path("train.txt").write_text("a b")
    assert refused(changes, rows) == sentence
    assert len(Path("train.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("case", OF_A_ROW)
def test_a_row(refused: Callable[..., str], case: str):
    row, reason = OF_A_ROW[case]
    assert refused({"trainer.callbacks": [ROLLOUT, MATH]}, [*GOOD, row]) == (
        f"train.jsonl has 1 unusable row, counted from 0 (row 4: {reason}); {MEND}"
    )


def test_rows_that_may_be_left_out_are_counted(fit: Callable[..., None], caplog: pytest.LogCaptureFixture):
    rows = [*GOOD, {"prompt": "a b c d", "answer": "c"}, {"prompt": "a"}]
    with caplog.at_level(logging.INFO):
        fit({LONGEST: 3, "data.init_args.on_bad_row": "skip"}, rows)
    assert (
        "train: 4 prompts of train.jsonl; left out 1 longer than 3 tokens and 1 that cannot be used."
        in caplog.messages
    )


def test_a_tokenizer_without_an_end_of_sequence_token(refused: Callable[..., str]):
    assert refused(tokenizer={"eos_token": None}) == (
        "The tokenizer of `model.policy.tokenizer`='./tokenizer' has no end-of-sequence token, so no response could stop; "
        "set `eos_token` in its tokenizer_config.json."
    )


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_and_says_so(fit: Callable[..., None]):
    sentence = (
        r"The tokenizer of `model\.policy\.tokenizer`='\./tokenizer' has no pad token; its end-of-sequence token '<eos>' is "
        "used for padding, which the masks leave out"
    )
    with pytest.warns(UserWarning, match=sentence):
        fit(tokenizer={"pad_token": None})
