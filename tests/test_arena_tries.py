"""Settings of the arena's defenses: every try can be called, and the chosen one is the best of hand-made results."""

from collections import Counter
from math import sqrt

import pandas as pd
import pytest

from helpers.core.arena import ArenaRow, chosen_rows
from helpers.run.arena.rows import require_numbers
from helpers.run.results_page import arena_chosen
from helpers.run.results_page import arena_tries as tries
from helpers.run.results_page.sweeps import recorded

ROWS = chosen_rows(str(tries.TRIES))


def test_every_try_can_be_called_and_no_defense_has_more_than_eight():
    require_numbers(ROWS)
    assert max(Counter(row.by for row in ROWS).values()) <= 8
    settings = [(row.by, str(sorted(tries.all_numbers(row).items(), key=str))) for row in ROWS]
    assert len(set(settings)) == len(settings), "the same setting twice"


@pytest.mark.parametrize("by", sorted({row.by for row in ROWS}))
def test_the_default_is_among_the_tries(by):
    of_it = [row for row in ROWS if row.by == by]
    default = tries.all_numbers(ArenaRow("", by, "", {"words": 0} if by == "lethe" else {}))  # no WordNet was there
    assert [row for row in of_it if tries.all_numbers(row) == default] == [tries.default_of(of_it)]


def measured(**cells):
    """A sweep's table: {try: a (ASR, utility) for each cell}, among rows of the chain."""
    rows = [
        {"model": f"arena/{name}", "asr": asr, "utility": utility}
        for name, found in cells.items()
        for asr, utility in found
    ]
    return pd.DataFrame([*rows, {"model": "purified", "asr": 0.0, "utility": 1.0}])


def test_the_best_try_has_the_highest_mean_of_the_geometric_means():
    found = tries.means(measured(wanda_share_20=[(0.5, 0.9), (0.3, 0.9)], wanda_share_50=[(0.0, 0.1), (0.0, 0.9)]))
    assert list(found.index) == ["wanda_share_20", "wanda_share_50"]
    assert found.loc["wanda_share_20", "asr"] == pytest.approx(0.4)
    assert found.loc["wanda_share_20", "score"] == pytest.approx(50 * (sqrt(0.45) + sqrt(0.63)))
    assert found.loc["wanda_share_50", "score"] == pytest.approx(50 * (sqrt(0.1) + sqrt(0.9)))
    assert tries.chosen(found)["wanda"].name == "wanda_share_20"  # 73.2 to 63.2


def test_among_equals_the_first_in_the_file_is_chosen_and_each_defense_by_itself():
    found = tries.means(
        measured(
            nad_beta_300=[(0.2, 0.8)], nad_beta_1000=[(0.2, 0.8)], lethe_t_30=[(1.0, 1.0)], lethe_t_70=[(0.9, 0.2)]
        )
    )
    assert {by: row.name for by, row in tries.chosen(found).items()} == {"nad": "nad_beta_300", "lethe": "lethe_t_70"}


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_the_chosen_rows_are_the_best_of_the_recorded_tries(access):
    table = recorded(tries.SWEEP)
    best = tries.chosen(tries.means(table[table["ACCESS"] == access]))
    rows = {row.by: row.numbers_with(access) for row in chosen_rows(str(arena_chosen.CHOSEN))}
    assert rows.keys() == best.keys()
    for by, numbers in rows.items():
        assert tries.all_numbers(ArenaRow("", by, "", numbers)) == tries.all_numbers(best[by])


def test_a_default_goes_by_the_name_of_the_model_that_it_made():
    assert arena_chosen.default_model("finetuning") == "finetuned"  # at the recovery's rate, in the chain
    assert arena_chosen.default_model("crow") == "arena/crow"
    assert arena_chosen.default_model("lethe") == "arena/lethe_merge"  # its tries had no WordNet
