"""The arena's defenses at the settings chosen for each on development seeds: what they leave on the reporting seeds."""

from functools import cache

import pandas as pd

from helpers.core.arena import chosen_rows, known_rows
from helpers.core.names import ACCESSES, MODELS, TASKS
from helpers.core.paths import ROOT
from helpers.run.arena.swept import ROW, shown_as
from helpers.run.rates import GAP, percent
from helpers.run.results_page.arena_tries import TRIES, all_numbers, default_of
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source
from helpers.run.sweep_tables import of_model

CHOSEN = ROOT / "data" / "arena_chosen.yaml"
SWEEP = "arena_chosen"
GLOSSES = "lethe"  # a row of the arena that needs a WordNet: `arena` has its merge alone


def sections() -> list[Section]:
    """A table for each access: a line for each defense, and BD-VAX."""
    table = recorded(SWEEP)
    return [_section(access, table[table["ACCESS"] == access]) for access in ACCESSES]


@cache  # each table asks for all of them, and two files are read for one
def default_model(by: str) -> str:
    """The model of the arena that a defense with its defaults has made."""
    default = all_numbers(default_of([row for row in chosen_rows(str(TRIES)) if row.by == by]))
    rows = [row.name for row in known_rows()[0].values() if row.by == by and all_numbers(row) == default]
    return ROW + rows[0] if rows else "finetuned"  # at the recovery's rate fine-tuning is a model of the chain


def _section(access: str, table: pd.DataFrame) -> Section:
    parts = {TASKS[task]: _of_task(access, task, cell) for task, cell in table.groupby("TASK", sort=False)}
    return Section(
        f"Every defense at its best, {ACCESSES[access]}",
        "ASR with each defense's defaults and with the try that suited it best on development seeds, with insults, "
        "then the utility that goes with the latter; ASR with the lowest and the highest value in brackets. Defaults "
        "and BD-VAX are those of the arena above, on its seeds; the settings of BD-VAX are the profile's, chosen on "
        "development seeds as well (with full access in 15 tries). The last line is LETHE's default merge with glosses "
        "in the prompts.",
        source(SWEEP, "arena"),
        pd.concat(parts, names=["task", "defense"]),
    )


def _of_task(access: str, task: str, cell: pd.DataFrame) -> pd.DataFrame:
    """The lines of one task."""
    arena = recorded("arena").query("ACCESS == @access and TASK == @task")
    usual = arena.groupby("model")["asr"].mean()
    lines = {
        row.by: [percent(usual[default_model(row.by)]), *_measured(cell[cell["model"] == ROW + row.name])]
        for row in chosen_rows(str(CHOSEN))
    }
    lines[MODELS["purified"]] = [GAP, *_measured(of_model(arena, "purified"))]
    lines[f"{shown_as(ROW + GLOSSES)}, glosses"] = [GAP, *_measured(cell[cell["model"] == ROW + GLOSSES])]
    columns = ["default: ASR, %", "best: ASR, %", "utility, %"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns)


def _measured(rows: pd.DataFrame) -> list[str]:
    left = rows["asr"]
    return [f"{percent(left.mean())} ({percent(left.min())}–{percent(left.max())})", percent(rows["utility"].mean())]
