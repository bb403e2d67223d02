from decimal import Decimal

import numpy as np
import pytest

from sppo_lightning.data import PromptFile, PromptSource
from sppo_lightning.data.layouts import LAYOUTS, Layout, RowError, read_row, read_source
from sppo_lightning.errors import InputError

USER = {"role": "user", "content": "What is 6 x 7?"}
SYSTEM = {"role": "system", "content": "Be brief."}


class Rows(PromptSource):
    def __init__(self, rows, layout="auto", columns=None):
        self._rows, self.layout, self.columns = rows, layout, columns

    @property
    def origin(self):
        return "rows.jsonl"

    def rows(self):
        return iter(self._rows)


def read_one(row, layout="auto", columns=None, gold_required=True):
    """The only record, or the only reason why there is none."""
    records, bad = read_source(Rows([row], layout, columns), gold_required)
    return records[0] if records else next(iter(bad.reasons))


def test_messages_layout():
    row = {
        "data_source": "math",
        "prompt": [SYSTEM, USER],
        "reward_model": {"ground_truth": "42", "style": "rule"},
        "extra_info": {"index": 3},
    }
    for layout in ("auto", "messages"):
        record = read_one(row, layout)
        assert record.prompt == (SYSTEM, USER)
        assert (record.row, record.gold, record.demonstration) == (0, "42", None)
        assert record.metadata == {k: row[k] for k in ("data_source", "reward_model", "extra_info")}


def test_prompt_answer_layout_takes_text_and_messages():
    record = read_one({"prompt": "6 x 7?", "answer": "42", "level": 2, "solution": "by heart"})
    assert (record.prompt, record.gold) == ("6 x 7?", "42")
    assert record.metadata == {"level": 2, "solution": "by heart"}
    assert read_one({"prompt": [USER], "answer": "42"}, "prompt_answer").prompt == (USER,)


def test_gsm8k_layout_takes_what_follows_the_last_marker():
    text = "6 bags of 200 are 1200.\n#### 1200 is not it\n#### 1,200 "
    for layout in ("auto", "gsm8k"):
        record = read_one({"question": "How many?", "answer": text}, layout)
        assert (record.prompt, record.gold, record.demonstration) == ("How many?", "1200", text)
    assert read_one({"question": "How many?", "answer": "12"}) == "no gold answer in answer after ####"


def test_trl_layout():
    record = read_one(
        {"prompt": [USER], "solution": "$42$", "completion": [{"role": "assistant", "content": "42!"}]}
    )
    assert (record.prompt, record.gold, record.demonstration) == ((USER,), "$42$", "42!")
    assert record.metadata == {}


def test_columns_map_names_and_reach_into_nested_ones():
    row = {"problem": "6 x 7?", "meta": {"gold": {"text": 42}}, "cot": "six sevens", "answer": "not this"}
    record = read_one(row, columns={"prompt": "problem", "answer": "meta.gold.text", "demonstration": "cot"})
    assert (record.prompt, record.gold, record.demonstration) == ("6 x 7?", "42", "six sevens")
    assert record.metadata == {"meta": {"gold": {"text": 42}}, "answer": "not this"}


def test_a_partial_mapping_keeps_the_other_columns_of_a_layout():
    assert read_one({"problem": "6 x 7?", "solution": "42"}, columns={"prompt": "problem"}).gold == "42"
    row = {"prompt": [USER], "reward_model": {"ground_truth": "42"}, "cot": "six sevens"}
    record = read_one(row, columns={"demonstration": "cot"})
    assert (record.gold, record.demonstration) == ("42", "six sevens")
    # an answer that is mapped is read as it is, without the marker of gsm8k
    assert (
        read_one({"question": "6 x 7?", "label": "42"}, columns={"prompt": "question", "answer": "label"}).gold
        == "42"
    )


def test_values_of_flat_files_and_arrays():
    row = {"prompt": '[{"role": "user", "content": "hi"}]', "reward_model": '{"ground_truth": "[1, 2]"}'}
    record = read_one(row)
    assert record.prompt == ({"role": "user", "content": "hi"},)
    assert record.gold == "[1, 2]"
    assert read_one({"prompt": np.array([USER], dtype=object), "answer": np.int64(42)}).prompt == (USER,)
    assert read_one({"prompt": "[1, 2] has which sum?", "answer": "3"}).prompt == "[1, 2] has which sum?"
    assert read_one({"prompt": "[1, 2]", "answer": "3"}).prompt == "[1, 2]"


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (42, "42"),
        (42.0, "42.0"),
        (np.float64(0.5), "0.5"),
        (Decimal("3.10"), "3.10"),
        (" x ", " x "),
        (0, "0"),
    ],
)
def test_a_number_becomes_its_text(value, gold):
    assert read_one({"prompt": "x", "answer": value}).gold == gold


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "no prompt in prompt"),
        ({"prompt": "  "}, "no prompt in prompt"),
        ({"prompt": []}, "prompt holds no messages"),
        ({"prompt": 7}, "prompt is of type int, not text or chat messages"),
        ({"prompt": [{"role": "user"}]}, "prompt has a message without role or content as text"),
        ({"prompt": [{"content": "x"}]}, "prompt has a message without role or content as text"),
        ({"prompt": ["x"]}, "prompt has a message without role or content as text"),
        ({"prompt": [SYSTEM]}, "prompt has no user message with content"),
        ({"prompt": [{"role": "user", "content": ""}]}, "prompt has no user message with content"),
        ({"prompt": [USER, {"role": "assistant", "content": "42"}]}, "prompt ends in an assistant message"),
        ({"answer": None}, "no gold answer in answer"),
        ({"answer": ""}, "no gold answer in answer"),
        ({"answer": float("nan")}, "no gold answer in answer"),
        ({"answer": True}, "the gold answer in answer is of type bool, not text or a number"),
        ({"answer": ["42"]}, "the gold answer in answer is of type list, not text or a number"),
    ],
)
def test_a_row_that_cannot_be_used_has_its_reason(changes, reason):
    with pytest.raises(RowError, match=reason):
        read_row(0, {"prompt": "x", "answer": "42", **changes}, LAYOUTS["prompt_answer"])


def test_a_missing_nested_answer_is_a_bad_row():
    row = {"prompt": "x", "reward_model": {"style": "rule"}}
    assert read_one(row) == "no gold answer in reward_model.ground_truth"


def test_the_gold_answer_may_be_missing_where_it_is_not_required():
    assert read_one({"prompt": "x", "answer": None}, gold_required=False).gold == ""
    assert read_one({"prompt": "x"}, gold_required=False).gold == ""
    assert read_one({"prompt": "x"}, "trl", gold_required=False).gold == ""
    assert read_one({"question": "x"}, gold_required=False).prompt == "x"


@pytest.mark.parametrize("column", ["demonstration", "response", "completion"])
def test_a_demonstration_is_text_or_the_last_assistant_turn(column):
    row = {"prompt": "x", "answer": "1"}
    turns = [USER, {"role": "assistant", "content": "no"}, USER, {"role": "assistant", "content": "yes"}]
    assert read_one({**row, column: "so"}).demonstration == "so"
    assert read_one({**row, column: turns}).demonstration == "yes"
    assert read_one({**row, column: None}).demonstration is None
    other = read_one({**row, column: [0.5, 0.25]})  # not a demonstration, whatever its name
    assert (other.demonstration, other.metadata) == (None, {column: [0.5, 0.25]})


def test_a_mapped_demonstration_must_be_one():
    with pytest.raises(RowError, match="cot is of type float without an answer's text"):
        read_row(0, {"prompt": "x", "answer": "1", "cot": 0.5}, Layout("prompt", "answer", "cot"))


def test_bad_rows_are_counted_and_the_first_five_named():
    rows = [{"prompt": "x", "answer": None if i % 2 else "1"} for i in range(14)] + [{"prompt": "", "answer": "1"}]
    records, bad = read_source(Rows(rows))
    assert [record.row for record in records] == [0, 2, 4, 6, 8, 10, 12]
    assert bad.summary() == (
        "8 unusable rows, counted from 0 (rows 1, 3, 5, 7, 9 and 2 more: no gold answer in answer; "
        "row 14: no prompt in prompt)"
    )


@pytest.mark.parametrize(
    ("row", "layout", "columns", "sentence"),
    [
        (
            {"text": "x", "label": "1"},
            "auto",
            None,
            "rows.jsonl has the columns text, label, which is none of the layouts messages, prompt_answer, gsm8k, "
            "trl, chat; say with `columns` which hold the prompt and the answer.",
        ),
        (
            {"prompt": "x", "label": "1"},
            "auto",
            None,
            "rows.jsonl has no column answer (a gold answer is read from answer), only prompt, label; "
            "name the right one in `columns`.",
        ),
        (
            {"prompt": "x", "label": "1"},
            "messages",
            None,
            "rows.jsonl has no column reward_model (`layout`=messages reads reward_model.ground_truth), only prompt, "
            "label; name the right one in `columns`.",
        ),
        (
            {"prompt": "x", "label": "1"},
            "auto",
            {"answer": "lable"},
            "rows.jsonl has no column lable (`columns` maps answer to lable), only prompt, label; "
            "name the right one in `columns`.",
        ),
        (
            {"prompt": "x", "label": "1"},
            "auto",
            {"anwser": "label"},
            "`columns` of rows.jsonl maps anwser, the nearest is answer; its keys are prompt, answer, demonstration, "
            "and other columns go to the metadata as they are.",
        ),
        (
            {"prompt": "x", "answer": "1"},
            "gsm8",
            None,
            "`layout`=gsm8 of rows.jsonl is unknown, the nearest is gsm8k; use auto, messages, prompt_answer, gsm8k, "
            "trl, chat.",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_one_sentence(row, layout, columns, sentence):
    with pytest.raises(InputError) as caught:
        read_source(Rows([row], layout, columns))
    assert str(caught.value) == sentence


def test_empty_data_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty.jsonl holds no rows; give a source with at least one prompt\."):
        read_source(PromptFile(str(tmp_path / "empty.jsonl")))


ANSWER = {"role": "assistant", "content": "42!", "reasoning_content": "six sevens"}


def test_chat_layout_ends_in_the_demonstration():
    row = {"messages": [SYSTEM, USER, ANSWER], "answer": 42, "level": 2}
    for layout in ("auto", "chat"):
        record = read_one(row, layout)
        assert (record.prompt, record.gold) == ((SYSTEM, USER), "42")
        assert (record.demonstration, record.turn, record.metadata) == ("42!", ANSWER, {"level": 2})
    earlier = [USER, {"role": "assistant", "content": "no"}, USER, ANSWER]
    record = read_one({"messages": earlier}, gold_required=False)
    assert (record.prompt, record.demonstration, record.gold) == (tuple(earlier[:3]), "42!", "")


def test_demonstrations_without_a_gold_answer():
    for prompt, completion in (("6 x 7?", "42"), ([USER], [ANSWER])):
        record = read_one({"prompt": prompt, "completion": completion}, gold_required=False)
        assert record.prompt == (prompt if isinstance(prompt, str) else (USER,))
        assert (record.demonstration, record.gold) == ("42" if completion == "42" else "42!", "")
        assert record.turn == (None if completion == "42" else ANSWER)
    assert read_one({"question": "6 x 7?", "response": "42"}, gold_required=False).demonstration == "42"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER], "messages does not end in an assistant message, which would be the demonstration"),
        ([USER, "42"], "messages does not end in an assistant message, which would be the demonstration"),
        ([USER, {"role": "assistant", "content": " "}], "the assistant's last message in messages has no text"),
        ([USER, {"role": "assistant"}], "the assistant's last message in messages has no text to learn from"),
        ([ANSWER], "messages has no user message before the assistant's"),
        ([SYSTEM, ANSWER], "messages has no user message with content"),
        ([], "messages holds no chat messages, the last of which would be the demonstration"),
        ("so what?", "messages holds no chat messages, the last of which would be the demonstration"),
        ([USER, {**ANSWER, "reasoning_content": "\ud800"}], "messages holds half of a surrogate pair"),
    ],
)
def test_a_conversation_without_a_demonstration_has_its_reason(messages, reason):
    with pytest.raises(RowError, match=reason):
        read_row(0, {"messages": messages, "answer": "42"}, LAYOUTS["chat"])
