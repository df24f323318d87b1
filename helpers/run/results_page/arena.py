"""The arena: every defense on the same suspicious models, and which of them leave no more than BD-VAX."""

import pandas as pd

from helpers.core.names import ACCESSES, TASKS
from helpers.run.arena.swept import methods, shown_as
from helpers.run.rates import span
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source

REAL_ARENA = "arena_smollm2"
MEANING = (
    "The defenses of both papers on the same backdoored models, sorted by what they leave of the ASR. Every recovery "
    "has the same rows, epochs and batch, and the same rate unless the row names another; what some rows spend beyond "
    "it, [defenses](defenses.md#the-arena) tells. FTR is the false trigger rate. What each row assumes stands in "
    "[threat models](threat-models.md#what-each-defense-assumes)."
)
REAL = (
    "As in the arena of the small model, with the rates of the profile `smollm2`. Rows that the time on the card was "
    "not enough for are missing. Utility is the share of answer tokens predicted right."
)
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
    """The arena on the small model: a table for each access and task that was recorded."""
    return [_section("The arena", MEANING, "arena", access, task) for access, task in _settings("arena")]


def real_sections() -> list[Section]:
    """The arena on the real model, as far as it was recorded."""
    return [_section("Its arena", REAL, REAL_ARENA, access, task) for access, task in _settings(REAL_ARENA)]


def _settings(name: str) -> list[tuple[str, str]]:
    """Access and task of the cells of a recorded arena, in their order."""
    return list(recorded(name)[["ACCESS", "TASK"]].drop_duplicates().itertuples(index=False, name=None))


def _section(title: str, meaning: str, name: str, access: str, task: str) -> Section:
    table = pd.DataFrame.from_dict(left(access, task, name), orient="index").rename_axis("model")
    return Section(
        f"{title}: {TASKS[task]}, {ACCESSES[access]}",
        meaning + (DRAWN if DRAWN_COLUMN in table else ""),
        source(name),
        table,
    )


def left(access: str, task: str, name: str = "arena") -> dict[str, dict[str, str]]:
    """What is measured of every model of the arena, as text, those with the lowest ASR first.

    Args:
        access, task: which cells of the sweep.
        name: of the sweep.

    Returns:
        {title: {heading: mean over the seeds in percent, with the lowest and the highest where there are several}};
        headings of what was measured at all.
    """
    table = recorded(name)
    table = table[(table["ACCESS"] == access) & (table["TASK"] == task)]
    by_asr = table.groupby("model")["asr"].mean().sort_values(kind="stable").index
    shown = {*methods(table), *FURTHER}
    order = ["clean", "backdoored", *(model for model in by_asr if model in shown)]
    there = {heading: column for heading, column in COLUMNS.items() if column in table and table[column].notna().any()}
    return {
        shown_as(model): {
            heading: span(table.loc[table["model"] == model, column]) for heading, column in there.items()
        }
        for model in order
    }
