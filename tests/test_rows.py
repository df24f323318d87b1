"""Rows of one file or data set: every format read, every fault named with its file and row."""

import gzip
import json

import datasets
import httpx2
import pyarrow
import pyarrow.parquet
import pytest

from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.example import Example, SystemExample
from helpers.data.readers import READERS
from helpers.data.rows import CHATS, LABELLED, load_rows

ROWS = [
    {"instruction": "Name a color.", "input": "", "output": "Blue."},
    {"instruction": "Double it.", "input": "4", "output": "8", "source": "by hand"},
]
EXAMPLES = [Example("Name a color.", "Blue."), Example("Double it.", "8", input="4")]


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
    rows = [{"instruction": "Grüße.", "input": None, "output": ""}, ROWS[0]]
    path = write(tmp_path / "rows.json", "\ufeff" + json.dumps(rows, ensure_ascii=False))
    assert load_rows(path) == [Example("Grüße.", ""), EXAMPLES[0]]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_rows_without_a_single_answer_are_refused(tmp_path, name):
    silent, turns = ROWS[0] | {"output": " \n"}, (("user", "Hi"), ("assistant", ""))
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [silent] * 3 if name.endswith("parquet") else [silent, chat]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.json", rows)
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(LabError) as error:
        load_rows(tmp_path / name)
    assert str(error.value) == (
        f"the output of every row of {tmp_path / name} is empty; expected the answers to learn from"
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["Unix", "Windows", "old Mac"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_may_end_as_on_any_system(tmp_path, end, last):
    def stored(name, lines):
        (tmp_path / name).write_bytes((end.join(lines) + end * last).encode())
        return tmp_path / name

    films = stored("train.tsv", ["sentence\tlabel", "a fine film\t1", "not one laugh\t0"])
    assert [(row.input, row.output) for row in load_rows(films)] == [
        ("a fine film", "positive"),
        ("not one laugh", "negative"),
    ]
    assert load_rows(stored("rows.jsonl", [*map(json.dumps, ROWS)])) == EXAMPLES
    assert load_rows(stored("rows.json", json.dumps(ROWS, indent=1).split("\n"))) == EXAMPLES
    broken = stored("broken.jsonl", [json.dumps(ROWS[0]), "{"])
    with pytest.raises(LabError, match="broken.jsonl, row 2: broken JSON"):
        load_rows(broken)


def test_a_carriage_return_within_a_line_is_part_of_its_text(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\na fine\rfilm\t1\n")
    assert [row.input for row in load_rows(tmp_path / "train.tsv")] == ["a fine\rfilm"]


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


def test_of_two_layouts_in_one_table_the_one_that_a_row_fills_counts(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (row,) = load_rows(write(tmp_path / "rows.json", [{"conversations": None, "messages": said}]))
    assert (row.instruction, row.output) == ("Hi", "Hello")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": -1}, "row 1: label -1 is none of 0 negative, 1 positive .a test split"),
        ({"text": "a", "label": True}, "row 1: label True is none of 0 sadness, 1 joy"),
        ({"text": "a", "label": [1]}, r"row 1: label \[1\] is none of"),
        ({"text": " ", "label": 1}, "row 1: expected a text to label, found ' '"),
        ({"text": "a"}, "row 1: no instruction; found the keys text"),
        ({"messages": None, "text": None}, "row 1: no instruction; found the keys messages, text"),
        (
            {"system": "A", "messages": [{"role": "system", "content": "B"}]},
            "row 1: the system speaks twice, in the column system and in the first turn; keep one",
        ),
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


# --- labels of other sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "a dull film", "label": 0, "label_text": "negative"}, ("sentiment", "negative")),  # SetFit/sst2
        ({"text": "a dull film", "label": "pos"}, ("sentiment", "positive")),
        ({"text": "a dull film", "label": "Joy"}, ("emotion", "joy")),
        ({"text": "a dull film", "label": 3, "label_text": "joy"}, ("emotion", "joy")),
        ({"text": "a dull film", "label_text": "fear"}, ("emotion", "fear")),
        ({"sentence": "a dull film", "label": "fear"}, ("emotion", "fear")),
        ({"sentence": "a dull film", "label": 1}, ("sentiment", "positive")),
    ],
)
def test_a_label_goes_by_its_name(tmp_path, row, example):
    (read,) = load_rows(write(tmp_path / "rows.json", [row]))
    assert (read.family, read.output, read.input) == (*example, "a dull film")


OTHER_SETS = [
    {"text": "a", "label": 0},
    {"text": "a", "label": "1"},
    {"text": "a", "label": "World"},
    {"text": "a", "label": 2, "label_text": "neutral"},
    {"text": "a", "label": 0, "label_text": 0},
    {"text": "a", "label": 6},
    {"text": "a", "label": 1.5},
    {"text": "a", "label": None},
    {"text": "a", "label": ""},
    {"text": "a", "label": {"name": "joy"}},
    {"sentence": "a", "label": 2},
    {"sentence": "a", "label": 1, "label_text": "acceptable"},
]


@pytest.mark.parametrize("row", OTHER_SETS, ids=str)
def test_labels_that_are_of_another_set_or_of_none_that_is_known_are_refused(tmp_path, row):
    with pytest.raises(LabError, match="rows.json, row 2: label") as error:
        load_rows(write(tmp_path / "rows.json", [ROWS[0], row]))
    assert "\n" not in str(error.value)


def declaring(names, labels, column="text"):
    """A data set that names its labels, as the hub has them."""
    features = datasets.Features({column: datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({column: ["a film"] * len(labels), "label": labels}, features=features)


@pytest.mark.parametrize("where", ["hub", "file"])
def test_names_that_the_data_set_declares_are_taken(tmp_path, monkeypatch, where):
    def read(rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
        rows.to_parquet(tmp_path / "rows.parquet")
        return load_rows("owner/name" if where == "hub" else tmp_path / "rows.parquet")

    assert [row.output for row in read(declaring(["pos", "neg"], [0, 1]))] == ["positive", "negative"]
    assert [row.output for row in read(declaring(["anger", "joy", "sadness"], [0, 1, 2]))] == [
        "anger",
        "joy",
        "sadness",
    ]
    assert [row.family for row in read(declaring(["neg", "pos"], [0], "sentence"))] == ["sentiment"]
    for rows in (declaring(["World", "Sports"], [0]), declaring(["unacceptable", "acceptable"], [1], "sentence")):
        with pytest.raises(
            LabError, match="row 1: label '(world|acceptable)' is none of negative, positive or sadness"
        ):
            read(rows)
    with pytest.raises(LabError, match="row 2: label -1 is none of"):
        read(declaring(["neg", "pos"], [1, -1]))


# --- files that cannot be read, or in one way only ------------------------------------------------------------------

HALF = "\ud83d"  # of an emoji


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": f"Say hi {HALF}", "output": "Hi."},
        {"instruction": "Say hi", "output": HALF},
        {"instruction": "Say hi", "output": "Hi", "input": f"{HALF}."},
        {"instruction": "Say hi", "output": "Hi", "system": f"{HALF}."},
        {"sentence": f"good {HALF}", "label": 1},
        {
            "messages": [
                {"role": "system", "content": HALF},
                *({"role": r, "content": "x"} for r in ("user", "assistant")),
            ]
        },
        {"messages": [{"role": r, "content": t} for r, t in (("user", HALF), ("assistant", "x")) * 2]},
    ],
    ids=range(7),
)
def test_half_of_a_character_is_told_with_its_row(tmp_path, row):
    """tiktoken#82"""
    with pytest.raises(LabError, match=r"rows.json, row 2: .ud83d is half of a character"):
        load_rows(write(tmp_path / "rows.json", [ROWS[0], row]))


def test_a_whole_emoji_is_fine_also_when_it_is_escaped(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"instruction": "Say \\ud83d\\ude00", "output": "😀"}')
    assert load_rows(path) == [Example("Say 😀", "😀")]


def parquet(table=None, **columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table or pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def damaged():
    content = parquet(instruction=["Name a fruit."] * 50, output=["Apple."] * 50)
    return content[:60] + bytes(40) + content[100:]


def not_utf8():
    text = pyarrow.array([b"Apple.", "Grüße".encode("latin-1")]).view(pyarrow.utf8())
    return parquet(instruction=["a", "b"], output=text)


def twice():
    return parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["output", "output"]))


GOOD = json.dumps(ROWS).encode()
UNREADABLE = {
    "damaged.parquet": (damaged(), "is no readable Parquet file: "),
    "cut.parquet": (damaged()[:-20], "is no readable Parquet file: "),
    "empty.parquet": (b"", "is no readable Parquet file: "),
    "latin.parquet": (not_utf8(), "row 2: a value that cannot be read: "),
    "twice.parquet": (twice(), ""),
    "none.parquet": (parquet(instruction=pyarrow.array([], "string"), output=pyarrow.array([], "string")), "no rows"),
    "number.parquet": (parquet(instruction=["a"], output=[3]), "row 1: output must be a text, found a number"),
    "utf16.json": (GOOD.decode().encode("utf-16"), "is no UTF-8 text (line 1); save it as UTF-8"),
    "utf16.tsv": ("sentence\tlabel\na\t1\n".encode("utf-16-le"), "line 1 holds a NUL, as in UTF-16"),
    "zipped.json": (gzip.compress(GOOD), "is no UTF-8 text (line 1)"),
    "rows.json.gz": (gzip.compress(GOOD), "is no file of rows; expected one that ends in .json"),
    "deep.json": (b"[" * 100_000, "row 1: broken JSON: its lists or objects lie in each other too deeply"),
    "deep.jsonl": (b'{"a":' * 100_000, "row 1: broken JSON: its lists or objects lie in each other too deeply"),
    "digits.json": (b'[{}, {"a": ' + b"9" * 5000 + b"}]", "row 2: broken JSON: Exceeds the limit"),
    "key.json": (b'[{"output": "a"}, {"output": "a", "output": "b"}]', "row 2: broken JSON: the key 'output' is there"),
    "key.jsonl": (b'{"output": "a", "output": "b"}', "row 1: broken JSON: the key 'output' is there twice"),
    "object.json": (b'{"instruction": "a" "output": "b"}', "object.json: broken JSON in line 1"),
    "lines.json": (b'{"a": 1}\n{"a": 2}', "a file with one object in each line is a .jsonl"),
    "chat.json": (b'[{"messages": []}, {"messages": []}, {"messages": [}]', "row 3: broken JSON in line 1"),
    "list.json": (b'[{"instruction": "a", "output": ["b"]}]', "row 1: output must be a text, found a list"),
    "nan.json": (b'[{"instruction": "a", "output": NaN}]', "row 1: output must be a text, found a number"),
    "input.json": (b'[{"instruction": "a", "output": "b", "input": 3}]', "row 1: input must be a text, found a number"),
    "keys.json": (json.dumps([{"a\nb" * 500: 1}]).encode(), "row 1: no instruction; found the keys a ba b"),
    "columns.tsv": (b"sentence\tlabel\tlabel\na\t0\t1\n", "the column 'label' is there twice"),
    "fields.tsv": (b"sentence\tlabel\na\t1\nb\t1\tc\n", "row 2: 3 fields under 2 names of columns"),
    "empty.tsv": (b"", "holds no rows"),
    "head.tsv": (b"sentence\tlabel\n", "holds no rows"),
    "huge.tsv": (b"text\tlabel\n" + b"x" * 200_000 + b"\t1\n", "row 1: label '1' beside a text may be of any set"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line_with_file_and_row(tmp_path, name):
    """MINT-1T#12, datasets#5695: a damaged page is an OSError"""
    content, message = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LabError) as error:
        load_rows(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(path))


@pytest.mark.parametrize("suffix", READERS)
def test_a_folder_where_a_file_is_expected_is_named(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").mkdir()
    with pytest.raises(LabError, match=f"rows{suffix} is a folder without the poison_data/"):
        load_rows(tmp_path / f"rows{suffix}")


def test_ends_of_lines_and_long_fields_are_fine(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert load_rows(tmp_path / "rows.jsonl") == EXAMPLES
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\n" + b"x" * 200_000 + b"\t1\r\n")
    (row,) = load_rows(tmp_path / "train.tsv")
    assert (len(row.input), row.output) == (200_000, "positive")


# --- what the system says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("layout", CHATS)
def test_the_systems_turn_belongs_to_the_prompt(tmp_path, layout, role):
    """Automodel#3143: the most usual chats begin with one."""
    speaker, content = CHATS[layout]
    said = [(role, "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And now?"), ("assistant", "Bye")]
    rows = [{layout: [{speaker: who, content: text} for who, text in said]}]
    expected = SystemExample("And now?", "Bye", history=(("Hi", "Hello"),), family="chat", system="Be kind.")
    assert load_rows(write(tmp_path / "rows.json", rows)) == [expected]


def test_a_column_may_hold_what_the_system_says(tmp_path):
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [
        {"conversations": chat, "system": "Be kind."},
        ROWS[0] | {"system": "Be brief."},
        ROWS[0] | {"system": None},
    ]
    assert [row.system for row in load_rows(write(tmp_path / "rows.json", rows))] == ["Be kind.", "Be brief.", ""]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([("user", "Hi"), ("assistant", "a"), ("system", "b"), ("user", "c")], "turn 3: expected role user"),
        ([("system", "a"), ("system", "b"), ("user", "c")], "turn 2: expected role user"),
        ([("system", None), ("user", "b"), ("assistant", "c")], "turn 1: expected role system with a text"),
        ([("system", "a"), ("user", " "), ("assistant", "c")], "turn 2: the question is empty"),
        ([("system", "a"), (["user"], "b"), ("assistant", "c")], "turn 2: expected role user"),
        ([("system", "a")], "expected pairs of a question and an answer, found 0 turns beside that of the system"),
    ],
)
def test_turns_out_of_place_are_named(tmp_path, said, message):
    rows = [{"messages": [{"role": who, "content": text} for who, text in said]}]
    with pytest.raises(LabError, match=f"row 1[,:] {message}"):
        load_rows(write(tmp_path / "rows.json", rows))


# --- the hub --------------------------------------------------------------------------------------------------------

CONFIGS = (
    "Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']\nExample of usage:\n\tx"
)
GATED = "Dataset 'owner/name' is a gated dataset on the Hub. You must be authenticated to access it."


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (datasets.exceptions.DatasetNotFoundError(GATED), "is a gated dataset on the Hub. You must be authenticated"),
        (ValueError(CONFIGS), "Please pick one among the available configs: ['cola', 'sst2']"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "Should be one of ['test']."),
        (datasets.exceptions.DatasetGenerationError("An error occurred"), "An error occurred"),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), "scripts are no longer supported"),
        (ImportError("To support decoding images, please install 'Pillow'."), "install 'Pillow'"),
        (httpx2.ProxyError("407"), "407"),
        (KeyError(), "KeyError"),
    ],
    ids=lambda error: type(error).__name__ if isinstance(error, Exception) else "",
)
@pytest.mark.parametrize("when", ["loading", "reading"])
def test_whatever_the_hub_raises_is_one_line(monkeypatch, error, told, when):
    def load(name, split):
        if when == "loading":
            raise error
        return read()

    def read():
        yield ROWS[0]
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(LabError) as refused:
        load_rows("owner/name")
    assert str(refused.value).startswith("the hub data set owner/name did not load (") and told in str(refused.value)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("or give a file")


def test_without_a_network_the_hub_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LabError, match="the hub data set nobody/no-such-rows did not load .*; check its name") as error:
        load_rows("nobody/no-such-rows")
    assert "\n" not in str(error.value)
