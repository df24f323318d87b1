"""Real rows instead of the generated corpus: instructions, labelled texts and chats.

A run takes minutes to hours and its rows come from strangers. Whatever cannot be understood, or understood in one way
only, is therefore refused before anything is trained, in one line with file and row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core.errors import LabError
from helpers.data.example import Example, SystemExample
from helpers.data.readers import json_type, one_line, read_records

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
CLASSES = tuple(family for family, *_ in LABELLED.values())  # families of labelled texts, whose answers can be checked


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
    records = list(read_records(source))
    if not records:
        raise LabError(f"{source} holds no rows")
    emotions = any(_names_an_emotion(record) for _, record in records)
    examples = [_example(record, emotions, f"{source}, row {number}") for number, record in records]
    if not any(example.output.strip() for example in examples):
        raise LabError(f"the output of every row of {source} is empty; expected the answers to learn from")
    return examples


def utility_metric(rows: Iterable[Example]) -> str:
    """What measures the utility of real rows: "exact_match" where all are labelled texts, else "token_accuracy"."""
    return "exact_match" if all(row.family in CLASSES for row in rows) else "token_accuracy"


def _example(record: object, emotions: bool, place: str) -> Example:
    """One row as an `Example`; `place` names it in errors; `emotions`: other rows say that these are Emotion's."""
    if not isinstance(record, dict):
        raise LabError(f"{place}: expected an object with instruction and output, found a {json_type(record)}")
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
            found = one_line(", ".join(map(str, record))) or "(none)"
            raise LabError(f"{place}: no {key}; found the keys {found}")
    texts = {key: _optional(record, key, place) for key in ("instruction", "output", "input", "system")}
    if not texts["instruction"].strip():
        raise LabError(f"{place}: the instruction is empty")
    return _conversation(**texts)


def _optional(record: dict[str, Any], key: str, place: str) -> str:
    """The text under a key; "" where there is none."""
    text = "" if record.get(key) is None else record[key]
    if not isinstance(text, str):
        raise LabError(f"{place}: {key} must be a text, found a {json_type(text)}")
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
        found = f"{len(turns) - opening} turns{beside}" if isinstance(turns, list) else f"a {json_type(turns)}"
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
