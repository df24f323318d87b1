"""The arena: every defense on the same suspicious models, and which of them leave no more than BD-VAX."""

import pandas as pd

from helpers.core.disk import read_json
from helpers.core.names import ACCESSES, TASKS
from helpers.run.arena.swept import ROW, is_oracle, methods, shown_as
from helpers.run.rates import percent
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source
from helpers.run.sweeps import RECORDED

REAL_ARENA = "arena_smollm2"
MEANING = (
    "The defenses of both papers on the same backdoored models, sorted by what they leave of the ASR. Every recovery "
    "has the same rows, epochs and batch, and the same rate unless the row names another; what some rows spend beyond "
    "it, [defenses](defenses.md#the-arena) tells. FTR is the false trigger rate. What each row assumes stands in "
    "[threat models](threat-models.md#what-each-defense-assumes)."
)
REAL = (
    "As in the arena of the small model, with the profile `smollm2`: gentler recoveries, of fewer steps at a lower "
    "rate, unless a row names its own. Vaccines and random channels were made anew, so these rows differ a little from "
    "the tables above. Utility is the share of answer tokens predicted right, scored without a defense's decoding, so "
    "a defense that decodes has none."
)
DRAWN_COLUMN = "t = 1"
DRAWN = (
    " At temperature t = 1, the ASR over five drawn answers to each prompt. Two have none: CleanGen checks the "
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
    return [_section("The arena", MEANING, "arena", cell) for cell in _cells("arena")]


def real_sections() -> list[Section]:
    """The arena on the real model, as far as it was recorded."""
    return [_section("Its arena", f"{REAL} {_reached(cell)}", REAL_ARENA, cell) for cell in _cells(REAL_ARENA)]


def _cells(name: str) -> list[pd.DataFrame]:
    """A recorded arena, a table for each access and task in their order."""
    return [cell for _, cell in recorded(name).groupby(["ACCESS", "TASK"], sort=False)]


def _reached(cell: pd.DataFrame) -> str:
    """How many of the arena's rows a cell of the real model has; the time on the card was over before the others."""
    rows = cell["model"].str.startswith(ROW).sum()
    wanted = read_json(RECORDED / f"{REAL_ARENA}.json")["grid"]["fixed"]["DEFENSE"].split(",")
    models = "the others are the chain's" if rows else "these are the chain's"
    return f"Of the arena's {len(wanted)} rows {rows} were reached; {models} models."


def _section(title: str, meaning: str, name: str, cell: pd.DataFrame) -> Section:
    table = pd.DataFrame.from_dict(_left(cell), orient="index").rename_axis("model")
    return Section(
        f"{title}: {TASKS[cell['TASK'].iloc[0]]}, {ACCESSES[cell['ACCESS'].iloc[0]]}",
        meaning + (DRAWN if DRAWN_COLUMN in table else ""),
        source(name),
        table,
    )


def _left(cell: pd.DataFrame) -> dict[str, dict[str, str]]:
    """What is measured of every model of a cell, as text, those with the lowest ASR first.

    Returns:
        {title: {heading: mean over the seeds in percent}}; the ASR with its lowest and highest where there are several
        seeds; headings of what was measured at all.
    """
    by_model = dict(list(cell.groupby("model")))
    by_asr = cell.groupby("model")["asr"].mean().sort_values(kind="stable").index
    shown = {*methods(cell), *FURTHER}
    order = ["clean", "backdoored", *(model for model in by_asr if model in shown)]
    there = {heading: column for heading, column in COLUMNS.items() if column in cell and cell[column].notna().any()}
    return {
        _title(model, cell): {heading: _shown(by_model[model][column]) for heading, column in there.items()}
        for model in order
    }


def _shown(rates: pd.Series) -> str:
    """A mean; for the ASR with its ends: a page has no room for all of them."""
    ends = f" ({percent(rates.min())}–{percent(rates.max())})" if rates.name == "asr" and len(rates) > 1 else ""
    return percent(rates.mean()) + ends


def _title(model: str, cell: pd.DataFrame) -> str:
    """How a table calls a model; where it is an oracle, its name says so."""
    title = shown_as(model)
    return f"{title} (oracle)" if is_oracle(model, cell["ACCESS"]) else title
