"""The tables of the notebooks in one form: text to the left, numbers to the right in one precision, dashes for gaps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd
from pandas.api.types import is_bool, is_integer, is_number
from pandas.io.formats.style import Styler

MISSING = "–"
LEFT, RIGHT = ("text-align", "left"), ("text-align", "right")
WRAP = [("white-space", "normal"), ("overflow-wrap", "anywhere"), ("max-width", "24em")]


def table(frame: pd.DataFrame, digits: int | Mapping[str, int] = 1, index: bool = True) -> Styler:
    """A table as a notebook shows it; the same table is the same HTML every time.

    Args:
        frame: values as they are; numbers that are no integers are rounded when they are shown.
        digits: decimals, of all columns or of each; a column that is not named has one.
        index: whether the row labels are shown; without them the order of the rows has to speak.
    """
    columns = [frame.iloc[:, position] for position in range(frame.shape[1])]  # names may be there twice
    decimals = [digits if isinstance(digits, int) else digits.get(column.name, 1) for column in columns]
    cells = [[shown(value, places) for value in column] for column, places in zip(columns, decimals, strict=True)]
    texts = pd.DataFrame(dict(enumerate(cells)), _with_safe_names(frame.index), dtype=object)
    texts.columns = _with_safe_names(frame.columns)
    name = hashlib.sha256(texts.to_csv().encode()).hexdigest()[:8]
    styler = Styler(texts, uuid=name, uuid_len=8).format(escape).set_table_styles(_rules(columns))
    for axis in ("index", "columns"):
        styler = styler.format_index(lambda value: escape(label(value)), axis=axis)
    return styler if index else styler.hide(axis="index")


def shown(value: object, digits: int = 1) -> str:
    """A value as a table shows it.

    Args:
        value: a text, a number, a truth value, several of them, or nothing (None, NaN, an empty text).
        digits: decimals of numbers that are no integers.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(shown(part, digits) for part in value) or MISSING
    if isinstance(value, str) or not is_number(value) or is_bool(value):
        return label(value)
    if pd.isna(value):
        return MISSING
    return (f"{value:,}" if is_integer(value) else f"{value:z,.{digits}f}").replace("-", "−")


def label(value: object) -> str:
    """The name of a row or a column as a table shows it: numbers in full, as they are names and not measured."""
    if isinstance(value, str):
        return value or MISSING
    if is_bool(value):
        return "yes" if value else "no"
    if pd.isna(value):
        return MISSING
    return f"{value:.12g}".replace("-", "−") if is_number(value) and not is_integer(value) else str(value)


def _with_safe_names(axis: pd.Index) -> pd.Index:
    """The index with markup in its names escaped, which a `Styler` shows as it is."""
    return axis.set_names([name if name is None else escape(str(name)) for name in axis.names])


def _rules(columns: list[pd.Series]) -> list[dict[str, object]]:
    """Of the style sheet: numbers to the right; row labels and columns that hold any text to the left."""
    rules = [
        {"selector": "td, th.col_heading", "props": [RIGHT]},
        {"selector": "th.row_heading, th.index_name", "props": [LEFT, *WRAP]},
        {"selector": "td", "props": WRAP},
    ]
    texts = [place for place, column in enumerate(columns) if not all(map(_is_amount, column.dropna()))]
    return rules + [{"selector": f".col{place}", "props": [LEFT]} for place in texts]


def _is_amount(value: object) -> bool:
    return is_number(value) and not is_bool(value)
