"""The tables of the notebooks in one form: text to the left, numbers to the right in one precision, dashes for gaps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool, is_integer, is_number
from pandas.io.formats.style import Styler

GAP = "–"
LEFT, RIGHT, CENTER = (("text-align", side) for side in ("left", "right", "center"))
WRAP = [("white-space", "normal"), ("overflow-wrap", "break-word"), ("max-width", "24em")]
AMOUNT = re.compile(GAP + r"|(< )?[-+−]?\d[\d,]*(\.\d+)?")  # a number that is a text already, such as a rounded p
AMOUNTS = re.compile(r"[-+−\d.,%(): to]+")  # amounts and nothing else, such as an interval


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
    _name_rows_in_the_heading(texts)
    name = hashlib.sha256(texts.to_csv().encode()).hexdigest()[:8]
    styler = Styler(texts, uuid=name, uuid_len=8).format(escape).set_table_styles(_rules(columns))
    for axis in ("index", "columns"):
        styler = styler.format_index(lambda value: escape(label(value)).replace(", %", ",\u00a0%"), axis=axis)
    return styler if index else styler.hide(axis="index")


def results(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What stands side by side when models are compared, in percent: one row for each.

    Args:
        reports: {model: report of `measure.report.evaluate`}.

    Returns:
        ASR with its 95 % interval, broken (degenerate or silent) and right answers under the trigger, false trigger
        rate, utility, and the perplexity as it is.
    """
    rows = {}
    for model, report in reports.items():
        low, high = report["asr_interval"]
        right, labels = report["right_under_trigger"], report["labels"]
        rows[model] = {
            "ASR, %": 100 * report["asr"],
            "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}",
            "broken, %": 100 * labels["degenerate"] + 100 * labels["silent"],
            "right, %": None if right is None else 100 * right,
            "FTR, %": 100 * report["false_trigger"],
            "utility, %": 100 * report["utility"],
            "perplexity": report["perplexity"],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def shown(value: object, digits: int = 1) -> str:
    """A value as a table shows it.

    Args:
        value: a text, a number, a truth value, several of them, or nothing (None, NaN, an empty text).
        digits: decimals of numbers that are no integers.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(shown(part, digits) for part in value) or GAP
    if isinstance(value, str) and AMOUNTS.fullmatch(value):
        return re.sub(r"(?<![^\s(])-(?=\d)", "−", value)
    if isinstance(value, str) or not is_number(value) or is_bool(value):
        return label(value)
    if pd.isna(value):
        return GAP
    return (f"{value:,}" if is_integer(value) else f"{value:z,.{digits}f}").replace("-", "−")


def label(value: object) -> str:
    """The name of a row or a column as a table shows it: numbers in full, as they are names and not measured."""
    if isinstance(value, str):
        return value or GAP
    if is_bool(value):
        return "yes" if value else "no"
    if pd.isna(value):
        return GAP
    return f"{value:.12g}".replace("-", "−") if is_number(value) and not is_integer(value) else str(value)


def _with_safe_names(axis: pd.Index) -> pd.Index:
    """The index with markup in its names escaped, which a `Styler` shows as it is."""
    return axis.set_names([name if name is None else escape(str(name)) for name in axis.names])


def _name_rows_in_the_heading(texts: pd.DataFrame) -> None:
    """Moves the one name of the rows to the empty corner of the heading, which saves a line that holds it alone."""
    if texts.index.nlevels == 1 and texts.columns.names[-1] is None:
        texts.columns = texts.columns.set_names([*texts.columns.names[:-1], texts.index.name])
        texts.index.name = None


def _rules(columns: list[pd.Series]) -> list[dict[str, object]]:
    """Of the style sheet: numbers to the right; row labels and columns that hold any text to the left.

    A heading of several columns stands over their middle.
    """
    rules = [
        {"selector": "td, th.col_heading", "props": [RIGHT]},
        {"selector": "th.row_heading, th.index_name", "props": [LEFT, *WRAP]},
        {"selector": "td", "props": WRAP},
    ]
    texts = [place for place, column in enumerate(columns) if not all(map(_is_amount, column.dropna()))]
    left = [{"selector": f"td.col{place}, th.col_heading.col{place}", "props": [LEFT]} for place in texts]
    return [*rules, *left, {"selector": "th.col_heading[colspan]", "props": [CENTER]}]


def _is_amount(value: object) -> bool:
    return bool(AMOUNT.fullmatch(value)) if isinstance(value, str) else is_number(value) and not is_bool(value)
