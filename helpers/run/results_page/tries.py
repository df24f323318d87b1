"""Settings of the arena's defenses, as they were chosen: the try that is best on the development seeds."""

from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

import pandas as pd

from helpers.core.arena import ArenaRow, chosen_rows
from helpers.core.paths import ROOT
from helpers.defenses.own import any_defense
from helpers.measure.report import joint_score
from helpers.run.rates import percent
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source

TRIES = ROOT / "data" / "arena_tries.yaml"
SWEEP, ROW = "arena_tries", "arena/"  # the recorded sweep; what the name of a row's model begins with


def sections() -> list[Section]:
    """One table, a line for each defense."""
    found = means(recorded(SWEEP))
    lines = {row.by: _line(found, row) for row in chosen(found).values()}
    return [
        Section(
            "Settings of each defense",
            "What was tried for the defenses of the arena and what is best on the development seeds, in both accesses "
            "together: the highest mean of √(utility · (100 − ASR)). The default is the number of the defense's own "
            "file, most often its paper's.",
            source(SWEEP),
            pd.DataFrame.from_dict(lines, orient="index").rename_axis("defense"),
        )
    ]


def means(table: pd.DataFrame) -> pd.DataFrame:
    """What each try leaves, over seeds and accesses: the means of `asr`, `utility` and of the joint `score`.

    Args:
        table: of a sweep, with a row for each try and cell.

    Returns:
        by the name of the try.
    """
    rows = table[table["model"].str.startswith(ROW)]
    rows = rows.assign(score=[joint_score(row) for row in rows.to_dict("records")])
    found = rows.groupby(rows["model"].str.removeprefix(ROW))
    return found[["asr", "utility", "score"]].mean()


def chosen(found: pd.DataFrame) -> dict[str, ArenaRow]:
    """The best try of each defense, the first in the file among equals.

    Args:
        found: of `means`.

    Returns:
        {defense: the row of the file of tries}.
    """
    best: dict[str, ArenaRow] = {}
    for row in tried(found.index):
        if row.by not in best or found.loc[row.name, "score"] > found.loc[best[row.by].name, "score"]:
            best[row.by] = row
    return best


def tried(names: Iterable[str]) -> list[ArenaRow]:
    """The rows of the file of tries that were measured, in its order."""
    measured = set(names)
    return [row for row in chosen_rows(str(TRIES)) if row.name in measured]


def all_numbers(row: ArenaRow) -> dict[str, Any]:
    """What a row's defense is called with: its defaults, and the row's own numbers over them."""
    parameters = signature(any_defense(row.by)).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not Parameter.empty}
    return defaults | dict(row.numbers)


def _line(found: pd.DataFrame, best: ArenaRow) -> dict[str, str | int]:
    of_it = [row for row in tried(found.index) if row.by == best.by]
    default = next(row for row in of_it if all_numbers(row) == all_numbers(ArenaRow("", best.by, "")))
    line: dict[str, str | int] = {"tries": len(of_it), "best": _in_words(best)}
    for heading, row in {"default": default, "best": best}.items():
        asr, utility = found.loc[row.name, ["asr", "utility"]]
        line[f"ASR, {heading}"], line[f"utility, {heading}"] = percent(asr), percent(utility)
    return line


def _in_words(row: ArenaRow) -> str:
    return ", ".join(f"{name} = {value}" for name, value in row.numbers.items())
