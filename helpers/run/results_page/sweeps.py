"""Recorded sweeps as the page tells them: plain names, percent, and where each number comes from."""

from collections.abc import Mapping
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
    """What vouches for the numbers of some sweeps: prompts, seeds, data file and grid of each."""
    return " ".join(_source(name, read_recorded(name)) for name in names)


def _source(name: str, table: pd.DataFrame) -> str:
    files = f"{link(RECORDED / f'{name}.json')}, made by {link(GRIDS / f'{name}.yaml')}."
    return f"{measured(table['n'], table['SEED'])}: {files}"


def measured(prompts: pd.Series, seeds: pd.Series) -> str:
    """On how many triggered prompts and which seeds something was measured."""
    shown = [", ".join(map(str, sorted(set(values)))) for values in (prompts, seeds)]
    return f"n = {shown[0]}, {'seeds' if seeds.nunique() > 1 else 'seed'} {shown[1]}"


def data_source(path: Path, prompts: pd.Series, seeds: pd.Series) -> str:
    """As `source`, of a file that no single grid made."""
    return f"{measured(prompts, seeds)}: {link(path)}."


def named(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """A table with other names for the levels of its index."""
    return table.rename_axis(index=[names.get(name, name) for name in table.index.names])
