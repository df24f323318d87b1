"""Markdown of the page: tables whose columns stand under each other in the source as well, and what surrounds them."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from helpers.core.paths import ROOT
from helpers.run.rates import GAP, number

WIDTH = 120


@dataclass(frozen=True)
class Section:
    """One table and what a reader needs to understand it.

    Args:
        title: its heading.
        caption: what the table shows, in plain English.
        source: how often and by what it was measured, and the files it comes from; several lines become a list.
        table: the index names what was measured, the columns hold the values.
        digits: decimals of all its numbers that are no integers.
    """

    title: str
    caption: str
    source: str
    table: pd.DataFrame
    digits: int = 1

    def markdown(self) -> str:
        """The section as it stands on the page."""
        sources = self.source.splitlines()
        parts = (
            f"### {self.title}",
            paragraph(self.caption),
            table_of(self.table, self.digits),
            items(sources) if len(sources) > 1 else paragraph(self.source),
        )
        return "\n\n".join(parts)


def paragraph(text: str, indent: str = "") -> str:
    """Prose in lines of the page's width; neither a link nor a number and its percent sign is broken.

    Args:
        indent: what all lines but the first begin with.
    """
    glued = text.replace(" %", "\0%")
    wrapped = textwrap.fill(glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapped.replace("\0%", " %")


def items(texts: Iterable[str]) -> str:
    """A list, one item for each text."""
    return "\n".join(paragraph(f"- {text}", indent="  ") for text in texts)


def link(path: Path) -> str:
    """A link from the page, which lies in `docs/`, to a file of the repository."""
    shown = path.relative_to(ROOT).as_posix()
    return f"[{shown}](../{shown})"


def table_of(table: pd.DataFrame, digits: int = 1) -> str:
    """A table with its index as the first columns; texts of the index to the left, everything else to the right."""
    labels = table.index.to_frame(index=False)
    columns = [_cells(labels[name], name, digits, left=not is_numeric_dtype(labels[name])) for name in labels]
    columns += [_cells(table[name], name, digits, left=False) for name in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))


def _cells(values: pd.Series, name: str, digits: int, left: bool) -> list[str]:
    """The lines of one column, padded: heading, rule and values."""
    heading, *shown = (name, *(_cell(value, digits) for value in values))
    width = max(3, *map(len, (heading, *shown)))
    rule = "-" * width if left else "-" * (width - 1) + ":"
    padded = [cell.ljust(width) if left else cell.rjust(width) for cell in (heading, *shown)]
    return [padded[0], rule, *padded[1:]]


def _cell(value: object, digits: int) -> str:
    if isinstance(value, str):
        return value or GAP
    return number(value, digits) if isinstance(value, float) else f"{value:,}"
