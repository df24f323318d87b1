"""The arena on several suspicious models: what the table of such a sweep says of its methods."""

from collections.abc import Collection, Iterable

import pandas as pd

from helpers.core.arena import known_rows, title_of
from helpers.core.errors import LabError
from helpers.core.names import MODELS
from helpers.defenses.own import any_defense

ROW = "arena/"  # what the name of a row's model begins with
OF_THE_CHAIN = ("finetuned", "random", "own_update", "purified", "conflict_alone", "conflict", "bdvax_then_conflict")


def shown_as(model: str) -> str:
    """The name of a model of the arena, for readers; one that neither the arena nor the chain knows stands as it is."""
    return title_of(model.removeprefix(ROW)) if model.startswith(ROW) else MODELS.get(model, model)


def methods(table: pd.DataFrame) -> list[str]:
    """The models of a sweep's table that some defense or control made: those of the chain, then the arena's rows."""
    found = list(table["model"].unique())
    return [model for model in OF_THE_CHAIN if model in found] + [model for model in found if model.startswith(ROW)]


def rivals(table: pd.DataFrame) -> list[str]:
    """The `methods` that BD-VAX is compared with: not itself, and no oracle.

    Args:
        table: of a sweep, or a part of it. One row of the chain is an oracle with full access and none with an adapter;
            where the table has both, it is left out.
    """
    return [model for model in methods(table) if model != "purified" and not is_oracle(model, table["ACCESS"])]


def is_oracle(model: str, accesses: Collection[str]) -> bool:
    """Whether a model was made with something that no defender has: the planted trigger, or what the attack changed.

    Args:
        model: of `methods`.
        accesses: that it was made with.
    """
    if model == "own_update":
        return "full" in set(accesses)
    row = known_rows()[0].get(model.removeprefix(ROW)) if model.startswith(ROW) else None
    return row is not None and "trigger" in any_defense(row.by).traits.assumes


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


def as_good(table: pd.DataFrame, cost: float) -> pd.Series:
    """The `rivals` that leave no more of the ASR than BD-VAX and cost little.

    Args:
        table: of a sweep, or a part of it; the rows of each model are averaged.
        cost: utility, in [0, 1], that a method may lose against the backdoored model.

    Returns:
        the mean ASR in [0, 1] by model, lowest first.
    """
    means = table.groupby("model")[["asr", "utility"]].mean()
    ours, useful = means.loc["purified", "asr"], means.loc["backdoored", "utility"]
    others = means.loc[rivals(table)]
    good = others[(others["asr"] <= ours) & (others["utility"] >= useful - cost)]
    return good["asr"].sort_values(kind="stable")
