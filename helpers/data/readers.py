"""Real rows instead of the generated corpus: instructions, labelled texts and chats, from a file or the hub.

A run takes minutes to hours and its rows come from strangers. Whatever cannot be read, or read in one way only, is
therefore refused before anything is trained, in one line with file and row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from helpers.core.errors import LabError
from helpers.core.paths import HUB_ID
from helpers.data.example import Example, SystemExample

Numbered = Iterator[tuple[int, Any]]

# Labelled texts, told by the column of the text: SST-2 (GLUE) and Emotion. The question is one that the generated
# corpus asks in the same family; the names are in the order of their numbers.
LABELLED = {
    "sentence": ("sentiment", "Is this review positive or negative?", ("negative", "positive")),
    "text": ("emotion", "Which emotion is this?", ("sadness", "joy", "love", "anger", "fear", "surprise")),
}
SHORT = {"neg": "negative", "pos": "positive"}
# Chats, told by the column of the turns: FastChat's layout, as Chat-Backdoor has it, and the hub's.
CHATS = {"conversations": ("from", "value"), "messages": ("role", "content")}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SYSTEM = ("system", "developer")  # who may speak before the first question
EXCERPT = 200  # characters of somebody else's text that an error repeats


def load_rows(source: str | Path) -> list[Example]:
    """The rows of a .json list, a .jsonl, .parquet or .tsv file, or of a hub data set's train split.

    A row holds `instruction`, `output` and perhaps `input`; or `sentence` or `text` and a label of SST-2 or Emotion; or
    `conversations` or `messages`, of which the last answer is the one to give. A text in `system`, or a first turn of
    the system, belongs to the prompt. Other columns are ignored.

    Labels are named by the row itself (in `label`, or `label_text`) or by the data set (Parquet and hub); a number
    alone is SST-2's beside `sentence`, and Emotion's beside `text` where another row names an emotion.

    Raises:
        LabError: nothing there, nothing in it, no answer in any row, broken, labels of another set or of none that can
            be known, or a row without its texts; names the file and the row.
    """
    records = list(_records(source))
    if not records:
        raise LabError(f"{source} holds no rows")
    emotions = any(_names_an_emotion(record) for _, record in records)
    examples = [_example(record, emotions, f"{source}, row {number}") for number, record in records]
    if not any(example.output.strip() for example in examples):
        raise LabError(f"the output of every row of {source} is empty; expected the answers to learn from")
    return examples


# --- files and data sets ------------------------------------------------------------------------------------------


def _records(source: str | Path) -> Numbered:
    """What lies behind `source`, numbered from 1."""
    path = Path(source)
    if path.is_dir():
        raise LabError(f"{source} is a folder without the poison_data/ of BackdoorLLM's layout; name a file in it")
    if path.suffix in READERS:
        return _read_file(path)
    if path.exists():
        raise LabError(f"{source} is no file of rows; expected one that ends in {', '.join(READERS)}")
    if HUB_ID.fullmatch(str(source)):
        return _read_hub(str(source))
    raise LabError(f"there is no file {source}; expected a path to {', '.join(READERS)} or a hub id like owner/name")


def _read_file(path: Path) -> Numbered:
    try:
        yield from READERS[path.suffix](path)
    except FileNotFoundError:
        raise LabError(f"there is no file {path}") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror or _excerpt(error)})") from None


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabError(f"{path} is no UTF-8 text (line {line}); save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise LabError(f"{path} is no text: line {line} holds a NUL, as in UTF-16; save it as UTF-8")
    return text


def _lines(path: Path) -> list[str]:
    """The lines of a text, by the line ends of Unix, Windows or, where there is no other, the old Mac."""
    text = _text(path)
    if "\n" not in text:
        return text.split("\r")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read_json(path: Path) -> Numbered:
    text = _text(path)
    if not text.strip():
        return
    try:
        records = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        line = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "; a file with one object in each line is a .jsonl" if "Extra data" in str(error) else ""
        raise LabError(f"{path}, row {_broken_row(text)}: broken JSON{line}: {_fault(error)}{hint}") from None
    if not isinstance(records, list):
        raise LabError(f"{path} is not a list of rows but one {_kind(records)}")
    yield from enumerate(records, 1)


def _read_jsonl(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), 1):
        try:
            if line.strip():
                yield number, json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise LabError(f"{path}, row {number}: broken JSON: {_fault(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys the last would win."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return record


def _broken_row(text: str) -> int:
    """The number of the first item of a JSON list that cannot be read."""
    decoder, between = json.JSONDecoder(object_pairs_hook=_unique), re.compile(r"[\s,]*")
    number, place = 1, between.match(text).end() + 1  # behind the bracket
    try:
        while True:
            _, place = decoder.raw_decode(text, between.match(text, place).end())
            number += 1
    except (ValueError, RecursionError):
        return number


def _fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists or objects lie in each other too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else _excerpt(error)


def _read_parquet(path: Path) -> Numbered:
    try:
        table = pyarrow.parquet.read_table(path)
        features = _declared(table.schema)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise LabError(f"{path} is no readable Parquet file: {_first_line(error)}") from None
    _require_distinct(table.column_names, path)
    for number, values in enumerate(zip(*table.columns, strict=True), 1):
        try:
            record = {name: value.as_py() for name, value in zip(table.column_names, values, strict=True)}
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise LabError(f"{path}, row {number}: a value that cannot be read: {_first_line(error)}") from None
        yield number, _named(record, features)


def _declared(schema: pyarrow.Schema) -> Mapping[str, Any]:
    """What the hub's Parquet files say of their columns."""
    return datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}


def _read_tsv(path: Path) -> Numbered:
    """Columns between tabs under a line of names; GLUE's files quote nothing."""
    head, *lines = _lines(path)
    names = head.split("\t")
    _require_distinct(names, path)
    for number, line in enumerate(filter(None, lines), 1):
        fields = line.split("\t")
        if len(fields) > len(names):
            raise LabError(f"{path}, row {number}: {len(fields)} fields under {len(names)} names of columns")
        yield number, dict(zip_longest(names, fields))


def _require_distinct(names: list[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise LabError(f"{path}: the column {name!r} is there twice")


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".tsv": _read_tsv}


def _read_hub(name: str) -> Numbered:
    try:
        rows = datasets.load_dataset(name, split="train")
        features = getattr(rows, "features", None) or {}
        yield from ((number, _named(record, features)) for number, record in enumerate(rows, 1))
    except Exception as error:  # of datasets, the hub's client, its HTTP client and what decodes: they share no class
        said = _excerpt(error) if isinstance(error, ValueError) else _first_line(error)
        raise LabError(
            f"the hub data set {name} did not load ({said}); check its name and the connection, or give a file"
        ) from None


def _named(record: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the name of its label, where the data set declares names and the record does not give one."""
    declared, label = features.get("label"), record.get("label")
    known = isinstance(declared, datasets.ClassLabel) and isinstance(label, int) and 0 <= label < len(declared.names)
    return {"label_text": declared.names[label]} | record if known else record


# --- rows ---------------------------------------------------------------------------------------------------------


def _example(record: object, emotions: bool, place: str) -> Example:
    """One row as an `Example`; `place` names it in errors; `emotions`: other rows say that these are Emotion's."""
    if not isinstance(record, dict):
        raise LabError(f"{place}: expected an object with instruction and output, found a {_kind(record)}")
    example = _read_example(record, emotions, place)
    turns = (text for turn in example.history for text in turn)
    for text in (example.system, *turns, example.instruction, example.input, example.output):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start].encode("unicode_escape").decode()
            raise LabError(
                f"{place}: {half} is half of a character (an emoji that was cut?); repair the text"
            ) from None
    return example


def _read_example(record: dict[str, Any], emotions: bool, place: str) -> Example:
    if record.get("instruction") is None:
        if column := next((name for name in CHATS if record.get(name) is not None), None):
            return _chat(record[column], *CHATS[column], _optional(record, "system", place), place)
        if column := _labelled_column(record):
            return _labelled(record, column, emotions, place)
    for key in ("instruction", "output"):
        if record.get(key) is None:
            found = _one_line(", ".join(map(str, record))) or "(none)"
            raise LabError(f"{place}: no {key}; found the keys {found}")
    texts = {key: _optional(record, key, place) for key in ("instruction", "output", "input", "system")}
    if not texts["instruction"].strip():
        raise LabError(f"{place}: the instruction is empty")
    return _conversation(**texts)


def _optional(record: dict[str, Any], key: str, place: str) -> str:
    """The text under a key; "" where there is none."""
    text = "" if record.get(key) is None else record[key]
    if not isinstance(text, str):
        raise LabError(f"{place}: {key} must be a text, found a {_kind(text)}")
    return text


def _labelled_column(record: object) -> str | None:
    """The column of the text in a row of labelled texts; None where a row is none."""
    if not isinstance(record, dict) or not ("label" in record or "label_text" in record):
        return None
    return next((name for name in LABELLED if name in record), None)


def _names_an_emotion(record: object) -> bool:
    return _labelled_column(record) == "text" and str(record.get("label")).lower() in LABELLED["text"][2]


def _labelled(record: dict[str, Any], column: str, emotions: bool, place: str) -> Example:
    """A labelled text as a question about it; the answer is the label's name."""
    text = record[column]
    if not isinstance(text, str) or not text.strip():
        raise LabError(f"{place}: expected a text to label, found {text!r:.60}")
    label = _label_name(record, column, emotions, place).strip().lower()
    label = SHORT.get(label, label)
    for family, question, names in LABELLED.values():
        if label in names:
            return Example(question, label, text.strip(), family=family)
    known = " or ".join(", ".join(names) for *_, names in LABELLED.values())
    raise LabError(f"{place}: label {label!r:.60} is none of {known}; write such rows as instruction and output")


def _label_name(record: dict[str, Any], column: str, emotions: bool, place: str) -> str:
    """The name of a row's label, in whose words ever."""
    if named := _optional(record, "label_text", place):
        return named
    label, names = record.get("label"), LABELLED[column][2]
    if isinstance(label, str) and re.search(r"[^\W\d_]", label):
        return label
    if str(label) not in map(str, range(len(names))):
        valid = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise LabError(f"{place}: label {label!r:.60} is none of {valid} (a test split without labels has -1)")
    if column == "text" and not emotions:
        raise LabError(
            f"{place}: label {label!r} beside a text may be of any set; give its name in label_text, or take the "
            "set's Parquet file, which names its labels"
        )
    return names[int(label)]


def _chat(turns: object, speaker: str, content: str, system: str, place: str) -> Example:
    """A conversation whose last answer is to be given; the earlier turns are its history."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    opening = int(first.get(speaker) in SYSTEM)
    if opening:
        if system:
            raise LabError(f"{place}: the system speaks twice, in the column system and in the first turn; keep one")
        system = _said(first, speaker, content, "system", f"{place}, turn 1")
    if not isinstance(turns, list) or len(turns) - opening < 2 or (len(turns) - opening) % 2:
        beside = " beside that of the system" if opening else ""
        found = f"{len(turns) - opening} turns{beside}" if isinstance(turns, list) else f"a {_kind(turns)}"
        raise LabError(f"{place}: expected pairs of a question and an answer, found {found}")
    said = [
        _said(turn, speaker, content, ("user", "assistant")[number % 2], f"{place}, turn {number + opening + 1}")
        for number, turn in enumerate(turns[opening:])
    ]
    *earlier, (question, answer) = zip(said[::2], said[1::2], strict=True)
    if not question.strip():
        raise LabError(f"{place}, turn {len(turns) - 1}: the question is empty")
    return _conversation(system, instruction=question, output=answer, history=tuple(earlier), family="chat")


def _conversation(system: str, **fields: Any) -> Example:
    return SystemExample(**fields, system=system) if system else Example(**fields)


def _said(turn: object, speaker: str, content: str, expected: str, place: str) -> str:
    """The text of a turn, which has to be the expected speaker's."""
    who, text = (turn.get(speaker), turn.get(content)) if isinstance(turn, dict) else (None, None)
    role = "system" if who in SYSTEM else SPEAKERS.get(who) if isinstance(who, str) else None
    if role != expected or not isinstance(text, str):
        wanted = f"{speaker} {expected} with a text in {content}"
        raise LabError(f"{place}: expected {wanted}, found {turn!r:.60}")
    return text


def _kind(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    names |= {type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:EXCERPT]


def _excerpt(error: Exception) -> str:
    return _one_line(str(error)) or type(error).__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:EXCERPT]
