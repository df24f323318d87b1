"""Recorded sweeps as the page tells them: plain names, percent, and where each number comes from."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from helpers.core.paths import ROOT
from helpers.run.results_page.markdown import link
from helpers.run.sweep_tables import in_plain_names
from helpers.run.sweeps import RECORDED, read_recorded

GRIDS = ROOT / "notebooks" / "parameters" / "grids"


def recorded(name: str) -> pd.DataFrame:
    """The table of a recorded sweep; its attacks and tasks have plain names, in columns `attack` and `task`."""
    return in_plain_names(read_recorded(name))


def source(*names: str) -> str:
    """What vouches for the numbers of some sweeps: a line for each, with its prompts, seeds, data file and grid."""
    return "\n".join(_source(name, read_recorded(name)) for name in names)


def _source(name: str, table: pd.DataFrame) -> str:
    files = f"recorded in {link(RECORDED / f'{name}.json')}, made by {link(GRIDS / f'{name}.yaml')}."
    return f"{measured(table['n'], table['SEED'])}; {files}"


def measured(prompts: pd.Series, seeds: pd.Series) -> str:
    """On how many triggered prompts and which seeds something was measured."""
    on = f"{'seeds' if seeds.nunique() > 1 else 'seed'} {in_words(seeds)}"
    return f"Measured with {in_words(prompts)} triggered prompts on {on}"


def in_words(values: Iterable[int]) -> str:
    """Which whole numbers there are: "30 to 32" where none between is missing, else "20 and 22"."""
    found = sorted(set(values))
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]} to {found[-1]}"
    *others, last = map(str, found)
    return f"{', '.join(others)} and {last}" if others else last


def data_source(path: Path, prompts: pd.Series, seeds: pd.Series) -> str:
    """As `source`, of a file that no single grid made."""
    return f"{measured(prompts, seeds)}; recorded in {link(path)}."


def named(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """A table with other names for the levels of its index."""
    return table.rename_axis(index=[names.get(name, name) for name in table.index.names])
