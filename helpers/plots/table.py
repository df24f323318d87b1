"""The tables of the notebooks in one form: text to the left, numbers to the right in one precision, dashes for gaps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

import pandas as pd
from pandas.api.types import is_bool, is_number
from pandas.io.formats.style import Styler

MISSING = "–"
LEFT = ("text-align", "left")
WRAP = [("white-space", "normal"), ("overflow-wrap", "anywhere"), ("max-width", "24em")]


def table(frame: pd.DataFrame, digits: int | Mapping[str, int] = 1, index: bool = True) -> Styler:
    """A table as a notebook shows it.

    Args:
        frame: values as they are; numbers that are no integers are rounded when they are shown.
        digits: decimals, of all columns or of each; a column that is not named has one.
        index: whether the row labels are shown; without them the order of the rows has to speak.
    """
    name = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # the same table is the same HTML every time
    styler = (
        Styler(frame, uuid=name, uuid_len=8).format_index(escape="html").format_index(escape="html", axis="columns")
    )
    rules = [{"selector": "th.row_heading, th.index_name", "props": [LEFT, *WRAP]}, {"selector": "td", "props": WRAP}]
    for position, column in enumerate(frame):
        decimals = digits if isinstance(digits, int) else digits.get(column, 1)
        styler = styler.format(partial(shown, digits=decimals), subset=[column], escape="html")
        if not all(map(is_number, frame[column].dropna())):
            rules += [{"selector": f".col{position}", "props": [LEFT]}]
    styler = styler.set_table_styles(rules)
    return styler if index else styler.hide(axis="index")


def shown(value: object, digits: int = 1) -> str:
    """A value as a table shows it.

    Args:
        value: a text, a number, a truth value, or nothing (None, NaN, an empty text).
        digits: decimals of numbers that are no integers.
    """
    if isinstance(value, str):
        return value or MISSING
    if is_bool(value):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(part, digits) for part in value) or MISSING
    if value is None or pd.isna(value):
        return MISSING
    whole = isinstance(value, int) or getattr(value, "dtype", None) is not None and value.dtype.kind in "iu"
    return f"{value:,}" if whole else f"{value:,.{digits}f}".replace("-", "−")
