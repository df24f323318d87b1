"""Recovery on plain and on perturbed rows, every method in both."""

import pandas as pd

from helpers.core.names import ACCESSES, MODELS
from helpers.run.rates import span
from helpers.run.recoveries import METHODS, recoveries, seeds_tested, told_apart
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import measured, recorded, source


def sections() -> list[Section]:
    """For each access what is left, and what paired tests say of it."""
    by_access = recoveries(recorded("perturbed")).groupby("ACCESS", sort=False)
    return [section for access, held in by_access for section in (_left(access, held), _tested(access, held))]


def _left(access: str, held: pd.DataFrame) -> Section:
    by_model = held.groupby(["rows", "model"], sort=False)
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


def _tested(access: str, held: pd.DataFrame) -> Section:
    told = held[held["SEED"].isin(seeds_tested(held))]
    return Section(
        f"Which recoveries tests tell apart, {ACCESSES[access]}",
        "Paired tests over the same prompts, a model on perturbed rows minus another one on them or itself on plain "
        "ones, in points: of payloads and of right answers to clean prompts. McNemar's exact test, with Holm's "
        "correction for these and for right answers under the trigger. The prompts of all seeds are pooled that were "
        "recorded prompt by prompt.",
        f"{measured(told['n'], told['SEED'])}; the record is that of the table above.",
        told_apart(held).map(lambda text: text.replace("-", "−")),
    )
