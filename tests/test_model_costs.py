"""What a defense cost is told from the stages between the suspicious model and its own."""

import pytest

from helpers.core.stages import entry, line_of
from helpers.run.model_costs import spent_on

MANIFESTS = {
    name: {"seconds": seconds, "peak_rss_mb": peak}
    for name, seconds, peak in (
        ("inject", 1000.0, 9000.0),
        ("variants", 100.0, 500.0),
        ("scores", 1.0, 200.0),
        ("suppressed", 2.0, 300.0),
        ("purified", 20.0, 400.0),
        ("suppressed_random", 3.0, 310.0),
        ("random", 30.0, 410.0),
        ("finetuned", 40.0, 420.0),
        ("arena/crow", 50.0, 430.0),
        ("evaluate/purified", 7000.0, 8000.0),
        ("evaluate/arena/crow", 7000.0, 8000.0),
    )
}


@pytest.mark.parametrize(
    ("model", "seconds", "peak"),
    [
        ("purified", 123.0, 500.0),
        ("random", 33.0, 410.0),  # its channels are drawn: no vaccine was needed
        ("finetuned", 40.0, 420.0),
        ("arena/crow", 50.0, 430.0),
    ],
)
def test_the_stages_of_a_defense_are_added_and_neither_the_attack_nor_the_measuring(model, seconds, peak):
    assert spent_on(model, MANIFESTS) == {"seconds": seconds, "peak_mb": peak}


@pytest.mark.parametrize("model", ["clean", "backdoored", "merges/ties", "argued/book-merged-evidence", "of my own"])
def test_what_no_defense_made_alone_has_no_cost(model):
    assert spent_on(model, MANIFESTS) == {}


def test_a_part_of_the_stages_is_no_cost():
    assert spent_on("purified", {name: one for name, one in MANIFESTS.items() if name != "variants"}) == {}


def test_a_row_of_the_arena_starts_from_the_suspicious_model():
    assert line_of("arena/crow") == {"arena/crow", "inject"} and entry("evaluate/arena/crow").measures == 1
