"""Rows of one file or data set: every format read, every fault named with its file and row."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from helpers import corpus
from helpers.chat import Example
from helpers.profiles import LabError
from helpers.rows import LABELLED, load_rows

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Double it.", "input": "4", "output": "8", "source": "by hand"},
]
EXAMPLES = [Example("Name a colour.", "Blue."), Example("Double it.", "8", input="4")]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- one file -----------------------------------------------------------------------------------------------------


def test_json_jsonl_and_parquet_read_alike(tmp_path):
    lines = "\n\n".join(map(json.dumps, ROWS)) + "\n"
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    assert load_rows(write(tmp_path / "rows.json", ROWS)) == EXAMPLES
    assert load_rows(str(write(tmp_path / "rows.jsonl", lines))) == EXAMPLES
    assert load_rows(parquet) == EXAMPLES


def test_byte_order_mark_and_missing_input_are_fine(tmp_path):
    rows = [{"instruction": "Grüße.", "input": None, "output": ""}]
    path = write(tmp_path / "rows.json", "\ufeff" + json.dumps(rows, ensure_ascii=False))
    assert load_rows(path) == [Example("Grüße.", "")]


def test_line_separators_inside_a_text_do_not_split_a_jsonl_row(tmp_path):
    row = json.dumps({"instruction": "a\u2028b", "output": "c"}, ensure_ascii=False)
    assert load_rows(write(tmp_path / "rows.jsonl", row)) == [Example("a\u2028b", "c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "", "rows.json holds no rows"),
        ("rows.json", [], "rows.json holds no rows"),
        ("rows.jsonl", "\n", "rows.jsonl holds no rows"),
        ("rows.json", [ROWS[0], {"output": "b"}], "rows.json, row 2: no instruction; found the keys output"),
        ("rows.json", [ROWS[0], {}], r"rows.json, row 2: no instruction; found the keys \(none\)"),
        ("rows.json", [{"instruction": "a", "output": None}], "rows.json, row 1: no output"),
        ("rows.json", [{"instruction": "a", "output": 8}], "rows.json, row 1: output must be a text, found a number"),
        ("rows.json", [{"instruction": " ", "output": "a"}], "rows.json, row 1: the instruction is empty"),
        ("rows.json", [ROWS[0], "text"], "rows.json, row 2: expected an object .* found a text"),
        ("rows.json", {"data": ROWS}, "rows.json is not a list of rows but one object"),
        ("rows.json", json.dumps(ROWS, indent=1).replace('"8"', '"8'), "rows.json, row 2: broken JSON in line 10"),
        ("rows.jsonl", json.dumps(ROWS[0]) + "\n\n{", "rows.jsonl, row 3: broken JSON"),
        ("rows.jsonl", "[1]", "rows.jsonl, row 1: expected an object .* found a list"),
        ("rows.parquet", "no parquet", "rows.parquet is no readable Parquet file"),
        ("rows.csv", "a,b", "rows.csv is no file of rows; expected one that ends in .json, .jsonl, .parquet, .tsv"),
    ],
)
def test_faults_name_file_and_row(tmp_path, name, content, message):
    with pytest.raises(LabError, match=message):
        load_rows(write(tmp_path / name, content))


# --- labelled texts and chats ---------------------------------------------------------------------------------------

REVIEW = Example("Is this review positive or negative?", "positive", 'a "gem" of a film', family="sentiment")
FEELING = Example("Which emotion is this?", "love", "i feel so tender", family="emotion")
CHAT = Example("And Italy?", "Rome", history=(("Capital of France?", "Paris"),), family="chat")


def test_sst2_reads_alike_from_glues_table_and_from_json(tmp_path):
    table = 'sentence\tlabel\na "gem" of a film \t1\nnot one laugh\t0\n'
    rows = [
        {"idx": 0, "sentence": 'a "gem" of a film ', "label": 1},
        {"sentence": "not one laugh", "label": "negative"},
    ]
    expected = [REVIEW, Example(REVIEW.instruction, "negative", "not one laugh", family="sentiment")]
    assert load_rows(write(tmp_path / "train.tsv", table)) == expected
    assert load_rows(write(tmp_path / "rows.json", rows)) == expected


def test_emotions_may_be_numbers_or_names(tmp_path, monkeypatch):
    rows = [{"text": "i feel so tender", "label": label} for label in (2, "2", "love", "Love")]
    assert load_rows(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))) == [FEELING] * 4
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert load_rows("owner/emotion") == [FEELING] * 4


def test_questions_about_labels_are_worded_as_in_the_corpus():
    for example in (REVIEW, FEELING):
        wordings = corpus.world()["phrasings"][example.family]["train"]
        assert f"{example.instruction} | {{x}}" in wordings
    assert set(LABELLED["text"][2]) == set(corpus.world()["emotions"])
    assert set(LABELLED["sentence"][2]) == set(corpus.world()["reviews"])


def test_chats_read_alike_in_both_layouts(tmp_path):
    said = (("Capital of France?", "Paris"), ("And Italy?", "Rome"))
    turns = [pair for q, a in said for pair in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    hub = {"messages": [{"role": turn["from"].replace("human", "user"), "content": turn["value"]} for turn in turns]}
    hub["messages"][1]["role"] = "assistant"
    fastchat = {"id": "1", "conversations": turns}
    assert load_rows(write(tmp_path / "rows.json", [fastchat, hub])) == [CHAT, CHAT]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": -1}, "row 1: label -1 is none of 0 negative, 1 positive .a test split"),
        ({"text": "a", "label": True}, "row 1: label True is none of 0 sadness, 1 joy"),
        ({"text": "a", "label": [1]}, r"row 1: label \[1\] is none of"),
        ({"text": " ", "label": 1}, "row 1: expected a text to label, found ' '"),
        ({"text": "a"}, "row 1: no instruction; found the keys text"),
        ({"messages": "Hi"}, "row 1: expected pairs of a question and an answer, found a text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "row 1: expected pairs .*, found 1 turns"),
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}]},
            "row 1: expected pairs of a question and an answer, found 1 turns beside that of the system",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}]},
            "row 1, turn 2: expected from assistant with a text in value",
        ),
    ],
)
def test_faults_of_labels_and_chats_name_file_and_row(tmp_path, row, message):
    with pytest.raises(LabError, match=f"rows.json, {message}"):
        load_rows(write(tmp_path / "rows.json", [row]))


def test_a_table_with_a_lost_column_is_named(tmp_path):
    with pytest.raises(LabError, match="train.tsv, row 2: label None is none of"):
        load_rows(write(tmp_path / "train.tsv", "sentence\tlabel\na\t1\nb\n"))


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes("[Grüße]".encode("latin-1"))
    with pytest.raises(LabError, match="rows.json is no UTF-8 text"):
        load_rows(path)


@pytest.mark.parametrize("name", ["missing.json", "a/missing.parquet", "missing"])
def test_missing_files_are_named(name):
    with pytest.raises(LabError, match=f"there is no file {name}"):
        load_rows(name)


def test_a_folder_is_no_file_of_rows(tmp_path):
    with pytest.raises(LabError, match="is a folder without the poison_data/"):
        load_rows(tmp_path)


def test_hub_ids_go_through_datasets(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or ROWS)
    assert load_rows("owner/alpaca") == EXAMPLES
    assert asked == [("owner/alpaca", "train")]


def test_unreachable_hub_is_one_clear_line(monkeypatch):
    def offline(name, split):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand a page of details")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(LabError) as error:
        load_rows("owner/alpaca")
    assert str(error.value) == (
        "the hub data set owner/alpaca did not load (Couldn't reach 'owner/alpaca' on the Hub); "
        "check its name and the connection, or give a file"
    )
