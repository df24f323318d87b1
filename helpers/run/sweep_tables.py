"""What the table of a sweep says: the rows of one model, means over seeds, and what a defense cost in the same runs."""

from collections.abc import Sequence

import pandas as pd

from helpers.core.names import ATTACKS, SETTINGS, TASKS
from helpers.run.rates import span


def in_plain_names(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its attacks and tasks in plain names as well, in columns `attack` and `task`."""
    for column, names in (("ATTACK", ATTACKS), ("TASK", TASKS)):
        if column in table:
            table = table.assign(**{column.lower(): table[column].map(names).fillna(table[column])})
    return table


def moved_settings(table: pd.DataFrame) -> list[str]:
    """What each row sets that not every row does, in plain names: "share 0.3, heads 1"."""
    columns = [column for column in table if column in SETTINGS]
    return [
        ", ".join(f"{SETTINGS[column]} {_plain(row[column])}" for column in columns if pd.notna(row[column]))
        for _, row in table.iterrows()
    ]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def of_model(table: pd.DataFrame, model: str, **where: object) -> pd.DataFrame:
    """The rows of one model, and of these the ones with given values in some columns."""
    rows = table[table["model"] == model]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def over_seeds(rows: pd.DataFrame, keys: Sequence[str] | str, measure: str = "asr") -> pd.Series:
    """A measure in percent for each value of the keys: mean over the seeds, lowest and highest.

    Args:
        rows: of one model, see `of_model`.
        keys: the columns that tell runs apart which differ in more than their seed.
        measure: a column of rates.
    """
    return rows.groupby(keys, sort=False)[measure].agg(span)


def means(table: pd.DataFrame, model: str, keys: Sequence[str], measure: str = "asr") -> pd.Series:
    """A measure of one model in percent for each value of the keys, as a mean over the seeds."""
    return 100 * of_model(table, model).groupby(list(keys), sort=False)[measure].mean()


def lost(table: pd.DataFrame, before: str, after: str, keys: Sequence[str]) -> pd.Series:
    """Points of utility between two models of the same runs, as means over the seeds."""
    return means(table, before, keys, "utility") - means(table, after, keys, "utility")
