"""Files of rows and data sets of the hub: their records as they stand there, each with its number.

Whatever cannot be read, or read in one way only, is refused in one line with file and row.
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

Numbered = Iterator[tuple[int, Any]]

EXCERPT = 200  # characters of somebody else's text that an error repeats


def read_records(source: str | Path) -> Numbered:
    """What a file, or a hub data set's train split, holds, numbered from 1.

    Args:
        source: a path that ends as one of `READERS`, or a hub id.

    Raises:
        LabError: nothing there, a folder, or broken; names the file and, where it is known, the row. Some of it comes
            to light only while the records are taken.
    """
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
        row = f", row {_broken_row(text)}" if text.lstrip().startswith("[") else ""
        raise LabError(f"{path}{row}: broken JSON{line}: {_fault(error)}{hint}") from None
    if not isinstance(records, list):
        raise LabError(f"{path} is not a list of rows but one {json_type(records)}")
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


def json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    names |= {type(None): "null"}
    return names.get(type(value), type(value).__name__)


def one_line(text: str) -> str:
    """The beginning of somebody else's text on one line, for an error that repeats it."""
    return " ".join(text.split())[:EXCERPT]


def _excerpt(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:EXCERPT]
