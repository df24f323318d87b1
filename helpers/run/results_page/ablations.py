"""The sweeps that take BD-VAX apart."""

import pandas as pd

from helpers.core.names import SCORES
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import recorded, source
from helpers.run.sweep_tables import means

RIGHT = "right_under_trigger"


def sections() -> list[Section]:
    """One table for each sweep."""
    return [_scores()]


def _scores() -> Section:
    table = recorded("scores").rename(columns={"ACCESS": "access"})
    table["score"] = table["signature.combine"].map(SCORES)
    keys = ["access", "task", "score"]
    columns = {
        "planted": means(table, "backdoored", keys),
        "suppressed": means(table, "suppressed", keys),
        "BD-VAX": means(table, "purified", keys),
        "right, %": means(table, "purified", keys, RIGHT),
        "utility, %": means(table, "purified", keys, "utility"),
    }
    return Section(
        "What the score is made of",
        "BD-VAX with the two terms of its score together and each alone, BadNets: ASR before, after suppression and "
        "after recovery, then right answers under the trigger and utility. The paper's Table 4 in small, which has "
        "refusal with adapter access: 10.7 % left by both, 10.3 % by strength alone, 77.0 % by alignment alone.",
        source("scores"),
        pd.DataFrame(columns),
    )
