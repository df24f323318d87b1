"""Settings of the arena's defenses, as they were chosen: with each access the try that is best on development seeds."""

from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

import pandas as pd

from helpers.core.arena import ArenaRow, chosen_rows
from helpers.core.names import ACCESSES
from helpers.core.paths import ROOT
from helpers.defenses.own import any_defense
from helpers.measure.reading import joint_score
from helpers.run.arena.swept import ROW
from helpers.run.rates import percent
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source
from helpers.run.sweep_tables import of_model

TRIES = ROOT / "data" / "arena_tries.yaml"
SWEEP = "arena_tries"


def sections() -> list[Section]:
    """A table for each access, with a line for each defense."""
    table = recorded(SWEEP)
    return [_section(access, table[table["ACCESS"] == access]) for access in ACCESSES]


def _section(access: str, table: pd.DataFrame) -> Section:
    found, ours = means(table), of_model(table, "purified")
    lines = {row.by: _line(found, row) for row in chosen(found).values()}
    return Section(
        f"Settings of each defense, {ACCESSES[access]}",
        "What was tried for the defenses of the arena, and what is best on the development seeds: the highest mean of "
        "√(utility · (100 − ASR)). The default is the number of the defense's own file, most often its paper's. On the "
        "same seeds BD-VAX with the profile's settings, chosen on development seeds as well (with full access in 15 "
        f"tries), leaves {percent(ours['asr'].mean())} % at a utility of {percent(ours['utility'].mean())} %.",
        source(SWEEP),
        pd.DataFrame.from_dict(lines, orient="index").rename_axis("defense"),
    )


def means(table: pd.DataFrame) -> pd.DataFrame:
    """What each try leaves: the means of `asr`, `utility` and of the joint `score` over all cells.

    Args:
        table: of a sweep with one access, a row for each try and seed.

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


def default_of(rows: list[ArenaRow]) -> ArenaRow:
    """The one of a defense's tries that has its defaults, in all that the tries do not have in common."""
    first = rows[0].numbers.items()
    shared = {name: value for name, value in first if all(row.numbers.get(name) == value for row in rows)}
    wanted = all_numbers(ArenaRow("", rows[0].by, "", shared))
    return next(row for row in rows if all_numbers(row) == wanted)


def all_numbers(row: ArenaRow) -> dict[str, Any]:
    """What a row's defense is called with: its defaults, and the row's own numbers over them."""
    parameters = signature(any_defense(row.by)).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not Parameter.empty}
    return defaults | dict(row.numbers)


def _line(found: pd.DataFrame, best: ArenaRow) -> dict[str, str | int]:
    of_it = [row for row in tried(found.index) if row.by == best.by]
    default = default_of(of_it)
    line: dict[str, str | int] = {"tries": len(of_it), "best": _in_words(best, of_it)}
    for heading, row in {"default": default, "best": best}.items():
        asr, utility = found.loc[row.name, ["asr", "utility"]]
        line[f"{heading}: ASR · utility, %"] = f"{percent(asr)} · {percent(utility)}"
    return line


def _in_words(best: ArenaRow, rows: list[ArenaRow]) -> str:
    """The numbers of the best try that not all tries have."""
    own = {name: value for name, value in best.numbers.items() if any(row.numbers.get(name) != value for row in rows)}
    return ", ".join(f"{name} {_plain(value)}" for name, value in own.items()) or "the default"


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}"
