"""Recovery on plain and on perturbed rows, every method in both."""

import pandas as pd

from helpers.core.names import ACCESSES, MODELS
from helpers.run.rates import span
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source
from helpers.run.sweep_tables import recovered_on

METHODS = ("finetuned", "random", "magnitude", "own_update", "purified")


def sections() -> list[Section]:
    """A table for each access."""
    table = recorded("perturbed")
    table = table.assign(rows=recovered_on(table))[table["model"].isin(METHODS)]
    return [_section(access, found) for access, found in table.groupby("ACCESS", sort=False)]


def _section(access: str, found: pd.DataFrame) -> Section:
    by_model = found.groupby(["rows", "model"], sort=False)
    table = pd.DataFrame({"ASR, %": by_model["asr"].agg(span), "utility, %": by_model["utility"].agg(span)})
    table = table.reindex(METHODS, level="model").rename(index=MODELS, level="model")
    table = table.rename_axis(["recovered on", "model"])
    return Section(
        f"Recovery on perturbed rows, {ACCESSES[access]}",
        "Every method recovers three times: on 200 plain rows; on three perturbed copies of each, with something odd "
        "inserted in every prompt, which guesses at the form of a trigger; and on the plain rows for as many steps. "
        "BadNets with insults. With full access the own update is an oracle.",
        source("perturbed"),
        table,
    )
