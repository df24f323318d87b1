"""The arena: every defense on the same suspicious models, and which of them leave no more than BD-VAX."""

import pandas as pd

from helpers.core.names import ACCESSES, TASKS
from helpers.run.arena.swept import methods, shown_as
from helpers.run.rates import span
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source

DRAWN_COLUMN = "ASR at t = 1, %"
DRAWN = (
    " At temperature t = 1 five answers are drawn to each prompt. Two have no such number: CleanGen checks the "
    "likeliest token alone, and what speculative decoding draws has the verifier's own distribution."
)
COLUMNS = {
    "ASR, %": "asr",
    DRAWN_COLUMN: "sampled_asr",
    "right, %": "right_under_trigger",
    "FTR, %": "false_trigger",
    "utility, %": "utility",
}
FURTHER = ("suppressed", "merged_suppressed")  # models of the chain that are shown beside its methods


def sections() -> list[Section]:
    """A table for each access and task that was recorded."""
    settings = recorded("arena")[["ACCESS", "TASK"]].drop_duplicates()
    return [_section(access, task) for access, task in settings.itertuples(index=False)]


def _section(access: str, task: str) -> Section:
    table = pd.DataFrame.from_dict(left(access, task), orient="index").rename_axis("model")
    return Section(
        f"The arena: {TASKS[task]}, {ACCESSES[access]}",
        "The defenses of both papers on the same backdoored models, sorted by what they leave of the ASR. Every "
        "recovery has the same rows, epochs and batch, and the same rate unless the row names another; what some rows "
        "spend beyond it, [defenses](defenses.md#the-arena) tells. FTR is the false trigger rate. What each row "
        "assumes stands in [threat models](threat-models.md#what-each-defense-assumes)."
        + (DRAWN if DRAWN_COLUMN in table else ""),
        source("arena"),
        table,
    )


def left(access: str, task: str) -> dict[str, dict[str, str]]:
    """What is measured of every model of the arena, as text, those with the lowest ASR first.

    Args:
        access, task: which cells of the sweep.

    Returns:
        {title: {heading: mean over the seeds in percent, with the lowest and the highest where there are several}}.
    """
    table = recorded("arena")
    table = table[(table["ACCESS"] == access) & (table["TASK"] == task)]
    by_asr = table.groupby("model")["asr"].mean().sort_values(kind="stable").index
    shown = {*methods(table), *FURTHER}
    order = ["clean", "backdoored", *(model for model in by_asr if model in shown)]
    return {shown_as(model): _measures(table[table["model"] == model]) for model in order}


def _measures(rows: pd.DataFrame) -> dict[str, str]:
    return {heading: span(rows[column]) for heading, column in COLUMNS.items() if column in rows}
