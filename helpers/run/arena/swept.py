"""The arena on several suspicious models: what the table of such a sweep says of its methods."""

from collections.abc import Collection

import pandas as pd

from helpers.core.arena import known_rows, title_of
from helpers.core.names import MODELS
from helpers.defenses.own import any_defense

ROW = "arena/"  # what the name of a row's model begins with
OF_THE_CHAIN = (
    "finetuned",
    "random",
    "magnitude",
    "own_update",
    "purified",
    "conflict_alone",
    "conflict",
    "bdvax_then_conflict",
)
TWICE = {"magnitude": "arena/magnitude_channels_recovered"}  # a control of the chain that is a row of the arena, too


def shown_as(model: str) -> str:
    """The name of a model of the arena, for readers; one that neither the arena nor the chain knows stands as it is."""
    return title_of(model.removeprefix(ROW)) if model.startswith(ROW) else MODELS.get(model, model)


def methods(table: pd.DataFrame) -> list[str]:
    """The models of a sweep's table that some defense or control made: those of the chain, then the arena's rows.

    What both hold is named once, as a row.
    """
    found = list(table["model"].unique())
    chain = [model for model in OF_THE_CHAIN if model in found and TWICE.get(model) not in found]
    return chain + [model for model in found if model.startswith(ROW)]


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
