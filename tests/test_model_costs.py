"""What a defense cost is told from the stages between the suspicious model and its own."""

import pytest

from helpers.run.model_costs import spent_on

STAGES = (  # name, seconds, MB, made from
    ("inject", 1000.0, 9000.0, ()),
    ("variants", 100.0, 500.0, ("inject",)),
    ("scores", 1.0, 200.0, ("inject", "variants")),
    ("suppressed", 2.0, 300.0, ("inject", "scores")),
    ("purified", 20.0, 400.0, ("suppressed",)),
    ("suppressed_random", 3.0, 310.0, ("inject", "scores")),
    ("random", 30.0, 410.0, ("suppressed_random",)),
    ("finetuned", 40.0, 420.0, ("inject",)),
    ("arena/crow", 50.0, 430.0, ("inject",)),
)
MANIFESTS = {
    name: {"seconds": seconds, "peak_rss_mb": peak, "parents": dict.fromkeys(parents, "a digest")}
    for name, seconds, peak, parents in (
        *STAGES,
        *((f"evaluate/{name}", 7000.0, 8000.0, (name,)) for name, *_ in STAGES),
        ("evaluate/backdoored", 7000.0, 8000.0, ("inject",)),
        ("evaluate/clean", 7000.0, 8000.0, ()),
        ("merges/ties", 7000.0, 8000.0, ("inject",)),
    )
}


@pytest.mark.parametrize(
    ("model", "seconds", "peak"),
    [
        ("purified", 123.0, 500.0),
        ("suppressed", 103.0, 500.0),
        ("suppressed_random", 3.0, 310.0),  # its channels are drawn: no vaccine was needed
        ("random", 33.0, 410.0),
        ("finetuned", 40.0, 420.0),
        ("arena/crow", 50.0, 430.0),
    ],
)
def test_the_stages_of_a_defense_are_added_and_neither_the_attack_nor_the_measuring(model, seconds, peak):
    assert spent_on(model, MANIFESTS) == {"seconds": seconds, "peak_mb": peak}


def test_the_challenge_test_counts_where_it_chose():
    chosen = {"challenge": {"seconds": 500.0, "peak_rss_mb": 600.0, "parents": {"scores": "a digest"}}}
    suppressed = MANIFESTS["suppressed"] | {"parents": {"inject": "", "scores": "", "challenge": ""}}
    assert spent_on("purified", MANIFESTS | chosen | {"suppressed": suppressed}) == {"seconds": 623.0, "peak_mb": 600.0}


@pytest.mark.parametrize("model", ["clean", "backdoored", "merges/ties", "of my own"])
def test_what_no_defense_made_alone_has_no_cost(model):
    assert spent_on(model, MANIFESTS) == {}


def test_a_part_of_the_stages_is_no_cost():
    assert spent_on("purified", {name: one for name, one in MANIFESTS.items() if name != "variants"}) == {}
