"""What the table of a sweep says: the rows of one model, means over seeds, each prompt, what utility was lost."""

from collections.abc import Iterable, Sequence

import pandas as pd

from helpers.core.errors import LabError
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


def parts_of(table: pd.DataFrame, stage: str) -> pd.DataFrame:
    """The rows of a stage that reports of several models, each under its own name: "M3" for "mixtures/M3"."""
    prefix = f"{stage}/"
    rows = table[table["model"].str.startswith(prefix)]
    return rows.assign(model=rows["model"].str.removeprefix(prefix))


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


def prompt_by_prompt(table: pd.DataFrame, models: Iterable[str] = ()) -> dict[str, dict[str, dict[str, str]]]:
    """What every single prompt got, as `measure.paired` compares it: the prompts of one seed behind those of another.

    Args:
        table: of a sweep, or a part of it that holds each model once at most for each seed.
        models: of them; all by default.

    Returns:
        {model: {"each": letters}} of the `seeds_by_prompt`; nothing where there is none. A measure that was recorded
        for no row, such as right answers where they are free text, is left out.

    Raises:
        LabError: a model twice for one seed: which of its prompts belong together?
    """
    rows = table[table["model"].isin(list(models) or table["model"])]
    if (twice := rows.duplicated(["SEED", "model"])).any():
        seed, model = rows.loc[twice, ["SEED", "model"]].iloc[0]
        raise LabError(f"seed {seed} has '{model}' more than once; give the rows of one setting")
    rows = rows[rows["SEED"].isin(seeds_by_prompt(table, models))].sort_values("SEED", kind="stable")
    columns = [column for column in _letters(rows) if rows[column].notna().all()]
    return {
        model: {"each": {column.removeprefix("each_"): "".join(of_model[column]) for column in columns}}
        for model, of_model in rows.groupby("model", sort=False)
    }


def seeds_by_prompt(table: pd.DataFrame, models: Iterable[str] = ()) -> list[int]:
    """The seeds for which every model was recorded prompt by prompt.

    Args:
        table, models: as in `prompt_by_prompt`.
    """
    rows = table[table["model"].isin(list(models) or table["model"])]
    columns = [column for column in _letters(rows) if rows[column].notna().any()]
    if not columns:
        return []
    told = rows[rows[columns].notna().all(axis=1)]
    counts = told.groupby("SEED")["model"].nunique()
    return sorted(counts[counts == rows["model"].nunique()].index)


def _letters(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column.startswith("each_")]
