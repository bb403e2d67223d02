from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_config import GOOD

TRAIN = "data.init_args.train"
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
def test_data(refused: Callable[..., str], case: str):
    changes, rows, sentence = OF_THE_DATA[case]
    assert refused(changes, rows) == sentence
    assert len(Path("train.jsonl").read_text().splitlines()) == len(rows)


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
