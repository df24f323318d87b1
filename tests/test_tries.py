"""Settings of the arena's defenses that a sweep tries: every one can be called, the default among them."""

from collections import Counter
from inspect import Parameter, signature

import pytest

from helpers.core.arena import ArenaRow, chosen_rows
from helpers.core.paths import ROOT
from helpers.defenses.own import any_defense
from helpers.run.arena.rows import require_numbers

ROWS = chosen_rows(str(ROOT / "data" / "arena_tries.yaml"))


def all_numbers(row):
    """What a row's defense is called with: its defaults, and the row's own numbers over them."""
    parameters = signature(any_defense(row.by)).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not Parameter.empty} | dict(row.numbers)


def test_every_try_can_be_called_and_no_defense_has_more_than_eight():
    require_numbers(ROWS)
    assert max(Counter(row.by for row in ROWS).values()) <= 8
    settings = [(row.by, str(sorted(all_numbers(row).items(), key=str))) for row in ROWS]
    assert len(set(settings)) == len(settings), "the same setting twice"


@pytest.mark.parametrize("by", sorted({row.by for row in ROWS}))
def test_the_default_is_among_the_tries(by):
    default = all_numbers(ArenaRow("", by, "", {"words": 0} if by == "lethe" else {}))  # no WordNet was there
    assert sum(all_numbers(row) == default for row in ROWS if row.by == by) == 1
