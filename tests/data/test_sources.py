import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_lightning.data import PromptFile
from sppo_lightning.errors import InputError

ROWS = [{"prompt": "one", "answer": "007"}, {"prompt": "two, three", "answer": "3.10"}]


def write(folder, name, rows=ROWS):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        path.write_text('prompt,answer\none,007\n"two, three",3.10\n')
    return str(path)


@pytest.mark.parametrize("ending", [".parquet", ".json", ".jsonl", ".csv"])
def test_every_format_gives_the_same_rows_and_keeps_answers_as_text(tmp_path, ending):
    source = PromptFile(write(tmp_path, "rows" + ending))
    assert [dict(row) for row in source.rows()] == ROWS
    assert list(source.rows()) == ROWS  # read anew at every call
    assert source.origin == str(tmp_path / ("rows" + ending))


def test_a_column_may_be_a_number_in_one_row_and_text_in_another(tmp_path):
    rows = [{"answer": 1}, {"answer": "1/2", "level": 5}]
    assert list(PromptFile(write(tmp_path, "rows.jsonl", rows)).rows()) == rows


def test_json_lines_are_read_under_the_ending_json(tmp_path):
    (tmp_path / "rows.json").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert list(PromptFile(str(tmp_path / "rows.json")).rows()) == [{"prompt": "one"}, {"prompt": "two"}]


def test_limit_takes_the_first_rows(tmp_path):
    assert list(PromptFile(write(tmp_path, "rows.csv"), limit=1).rows()) == ROWS[:1]
    with pytest.raises(InputError, match=r"`limit`=0 of rows.csv leaves no row; use 1 or more, or leave it out\."):
        PromptFile("rows.csv", limit=0)


def test_a_folder_has_a_split_per_file_and_joins_shards(tmp_path):
    write(tmp_path, "train-00000-of-00002.parquet", [{"prompt": "one"}])
    write(tmp_path, "train-00001-of-00002.parquet", [{"prompt": "two"}])
    write(tmp_path, "test.jsonl", [{"prompt": "three"}])
    assert [r["prompt"] for r in PromptFile(str(tmp_path), split="train").rows()] == ["one", "two"]
    assert [r["prompt"] for r in PromptFile(str(tmp_path), split="test").rows()] == ["three"]
    assert PromptFile("folder", split="test").origin == "folder (split test)"
    with pytest.raises(InputError, match=r"has the splits test, train; set `split` to one of them\."):
        PromptFile(str(tmp_path)).rows()
    with pytest.raises(InputError, match=r"`split`=validation is not in .*, which has test, train\."):
        PromptFile(str(tmp_path), split="validation").rows()


def test_a_glob_reads_all_matching_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "b.jsonl", [{"prompt": "two"}])
    write(tmp_path, "a.jsonl", [{"prompt": "one"}])
    assert [r["prompt"] for r in PromptFile(str(tmp_path / "*.jsonl")).rows()] == ["one", "two"]


def test_a_single_file_is_a_train_split(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    assert list(PromptFile(path, split="train").rows()) == ROWS
    with pytest.raises(InputError, match=r"`split`=test is not in .*rows.jsonl, which has train\."):
        PromptFile(path, split="test").rows()


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path, "train.parquet")
    write(tmp_path, "validation.parquet")
    with pytest.raises(InputError, match=r"trian.parquet does not exist in .*, the nearest is train\.parquet\.$"):
        PromptFile(str(tmp_path / "trian.parquet")).rows()
    with pytest.raises(InputError, match=r"does not exist in .*, which has train.parquet, validation.parquet\.$"):
        PromptFile(str(tmp_path / "x.csv")).rows()
    with pytest.raises(InputError, match=r"there is no such folder in "):
        PromptFile(str(tmp_path / "nowhere" / "deep" / "train.parquet")).rows()


def test_an_unreadable_file_says_where(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": \n')
    with pytest.raises(InputError, match=r"bad.jsonl is not JSON in line 3: Expecting value"):
        list(PromptFile(str(tmp_path / "bad.jsonl")).rows())
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    with pytest.raises(InputError, match=r"holds no JSON object in line 1: \[1, 2\]\."):
        list(PromptFile(str(tmp_path / "list.jsonl")).rows())
    (tmp_path / "text.json").write_text('["one"]')
    with pytest.raises(InputError, match=r"does not hold a list of JSON objects; write one object per row\."):
        list(PromptFile(str(tmp_path / "text.json")).rows())
    (tmp_path / "bad.parquet").write_text("no parquet at all")
    with pytest.raises(InputError, match=r"bad.parquet cannot be read as .parquet: .*magic bytes not found"):
        list(PromptFile(str(tmp_path / "bad.parquet")).rows())
    (tmp_path / "rows.txt").write_text("one")
    with pytest.raises(InputError, match=r"ending that is not read; use one of .parquet, .jsonl, .json, .csv\."):
        list(PromptFile(str(tmp_path / "rows.txt")).rows())
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match=r"empty.csv cannot be read as .csv: No columns to parse from file\."):
        list(PromptFile(str(tmp_path / "empty.csv")).rows())
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match=r"latin.jsonl cannot be read as .jsonl: 'utf-8' codec"):
        list(PromptFile(str(tmp_path / "latin.jsonl")).rows())


def test_a_hub_data_set_gives_its_splits(tmp_path, monkeypatch):
    """`datasets` reads a folder as it reads a data set of the hub; `owner/name` is one relative to it here."""
    import datasets

    from sppo_lightning.data.sources import _hub_rows

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    write(folder, "train.jsonl", [{"prompt": "one"}])
    write(folder, "test.jsonl", [{"prompt": "two"}])
    assert list(_hub_rows(str(folder), "test", None, None)) == [{"prompt": "two"}]
    with pytest.raises(InputError, match=r"`split`=dev is not in .*, which has train, test\."):
        _hub_rows(str(folder), "dev", None, None)


def test_a_hub_id_that_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"`path`=owner/nothing is no file here and cannot be loaded from the hub: "
    ):
        PromptFile("owner/nothing", split="train").rows()
