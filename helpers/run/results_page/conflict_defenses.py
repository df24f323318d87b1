"""Information conflicts, Tables 1 to 3 and 9 in small: the eight baselines, its own defense, and its eight attacks."""

from functools import partial

import pandas as pd

from helpers.run.conflict_defenses import CORPORA, defended
from helpers.run.rates import GAP, number
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source

TITLES = {"sst2": "SST-2", "emotion": "Emotion", "conversation": "conversation"}
SPENT = {"own_seconds": "seconds, mean", "own_peak_mb": "peak MB"}


def sections() -> list[Section]:
    """One table for each recorded corpus of the paper, and what the defenses cost."""
    table = defended(recorded("conflict_defenses"))
    corpora = [
        _corpus(table, ordinal, corpus)
        for ordinal, corpus in enumerate(CORPORA, start=1)
        if (table["corpus"] == corpus).any()
    ]
    return [*corpora, _costs(table)]


def _corpus(table: pd.DataFrame, ordinal: int, corpus: str) -> Section:
    rows = table[table["corpus"] == corpus]
    shown = rows.assign(both=_whole(rows["asr"]) + " · " + _whole(rows["right"]))  # of a hundred prompts each
    cells = shown.assign(attack=shown["attack"].where(shown["TASK"] != "autopoison", "AutoPoison"))
    return Section(
        f"Eight defenses: {TITLES[corpus]}",
        f"ASR · right answers to clean prompts, in percent; the paper's Table {ordinal} in small. The answers are "
        "those of the attacked task, the paper's accuracy; where an attack goes with every kind of prompt, those to "
        "all. Fine-tuning and speculative decoding have two rows each.",
        source("conflict_defenses"),
        cells.pivot(index="defense", columns="attack", values="both")
        .reindex(index=cells["defense"].unique(), columns=cells["attack"].unique())
        .fillna(GAP)
        .rename_axis(columns=None),
    )


def _whole(rates: pd.Series) -> pd.Series:
    return (100 * rates).map(partial(number, digits=0))


def _costs(table: pd.DataFrame) -> Section:
    spent = table.dropna(subset="own_seconds").groupby("defense", sort=False)
    means = spent.agg({"own_seconds": "mean", "own_peak_mb": "max"})
    return Section(
        "What the eight defenses cost",
        "Seconds from the suspicious model to the defended one, a mean over the attacks, and the most memory of the "
        "process, in which one defense ran after the other. Two runs shared two cores, at times with other work: the "
        "rows compare, the seconds do not carry over. What a defense adds to every answer is not in it, so there is no "
        "row for evidence. The paper's Table 9 in small.",
        source("conflict_defenses"),
        means.rename(columns=SPENT),
        digits=0,
    )
