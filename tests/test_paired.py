"""Paired tests: against coins thrown by hand, all swaps of small samples, and exact coverage."""

import itertools
from math import comb

import pytest

from helpers.core.errors import LabError
from helpers.measure.paired import (
    MEASURES,
    compare,
    compare_all,
    comparison_table,
    difference_interval,
    holm,
    mcnemar,
    paired_table,
    ranks,
    shown_p,
    verdicts,
)


def report(triggered, right=None, clean_right=None):
    return {"each": {"triggered": triggered, "right": right, "clean": "a" * 4, "clean_right": clean_right}}


# --- McNemar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 1.0),  # nothing tells them apart
        (3, 3, 1.0),
        (0, 1, 1.0),  # one throw of a coin says nothing
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (1, 7, 2 * (1 + 8) / 256),
        (9, 3, 2 * (1 + 12 + 66 + 220) / 4096),
    ],
)
def test_the_discordant_prompts_are_throws_of_a_coin(first, second, expected):
    assert mcnemar(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "two"), [("11110000", "00000000"), ("11101010", "00010010"), ("10", "10"), ("1111111", "0000001")]
)
def test_the_test_equals_all_swaps_of_the_two_models(one, two):
    """Were both models alike, each prompt could as well have given its two answers to the other model."""
    pairs = [(int(a), int(b)) for a, b in zip(one, two, strict=True)]
    seen = abs(sum(a - b for a, b in pairs))
    swaps = itertools.product((1, -1), repeat=len(pairs))
    extreme = [abs(sum(s * (a - b) for s, (a, b) in zip(signs, pairs, strict=True))) >= seen for signs in swaps]
    found = compare(report("a" * len(one), one), report("a" * len(two), two), "right under trigger")
    assert found.p == pytest.approx(sum(extreme) / 2 ** len(pairs))


def test_each_measure_reads_its_own_letters():
    first = report("ppadsa", "001001", "1101")
    second = report("pappap", "010100", "0001")
    found = {measure: compare(first, second, measure) for measure in MEASURES}
    counts = {measure: (d.first, d.second, d.n) for measure, d in found.items()}
    assert counts == {
        "payload": (1, 3, 6),
        "right under trigger": (2, 2, 6),
        "right on clean prompts": (2, 0, 4),
    }
    assert found["payload"].points == pytest.approx(-100 * 2 / 6)
    assert found["right on clean prompts"].points == 50.0


def test_the_other_way_round_only_the_sign_changes():
    one, two = report("pppaap"), report("aapapa")
    there, back = compare(one, two, "payload"), compare(two, one, "payload")
    assert (there.p, there.points) == (back.p, -back.points)
    assert there.interval == pytest.approx([-bound for bound in reversed(back.interval)])


# --- the interval ---------------------------------------------------------------------------------------------------


def test_the_interval_by_hand():
    """Airway reactivity before and after a transplantation (Bentur et al., 2009), the example of Fagerland et al.

    Of 21 children 1 before only, 7 after only: (2 - 8) / 23 and its variance (10/23 - 36/529) / 23 = 194 / 12167.
    """
    centre, half = -6 / 23, 1.959964 * (194 / 12167) ** 0.5
    assert difference_interval(1, 7, 21) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert difference_interval(1, 7, 21) == pytest.approx((-0.508, -0.013), abs=1e-3)


def test_the_interval_stays_among_the_possible_and_is_never_empty():
    assert difference_interval(3, 0, 3)[1] == 1.0
    low, high = difference_interval(0, 0, 200)  # two models that agree everywhere are not known to be equal
    assert -0.02 < low < 0 < high < 0.02


@pytest.mark.parametrize("n", [10, 25])
def test_the_interval_covers_what_it_promises(n):
    """Its exact coverage, over all samples of `n` pairs and many true rates of the two discordant kinds."""
    truths = [(a / 10, b / 10) for a in range(10) for b in range(10 - a) if a + b]
    covered = [coverage(n, *truth) for truth in truths]
    assert sum(covered) / len(covered) >= 0.95 and min(covered) >= 0.93


def coverage(n, only_first, only_second):
    """The chance that the interval of a sample holds the true difference."""
    chance = 0.0
    for first in range(n + 1):
        for second in range(n + 1 - first):
            low, high = BOUNDS.setdefault((first, second, n), difference_interval(first, second, n))
            if low <= only_first - only_second <= high:
                ways = comb(n, first) * comb(n - first, second)
                rest = (1 - only_first - only_second) ** (n - first - second)
                chance += ways * only_first**first * only_second**second * rest
    return chance


BOUNDS = {}


# --- Holm -----------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    """The smallest of four counts four times, the next three times; none falls below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_holm_is_the_worst_over_all_families_that_hold_the_test():
    """The closed test with Bonferroni's bound in each family, which Holm's steps stand for."""
    ps = [0.03, 0.2, 0.004, 0.03, 0.011, 1.0]
    families = [f for size in range(1, 7) for f in itertools.combinations(range(6), size)]
    bounds = {family: min(1.0, len(family) * min(ps[i] for i in family)) for family in families}
    expected = [max(bound for family, bound in bounds.items() if i in family) for i in range(6)]
    assert holm(ps) == pytest.approx(expected)


# --- a family -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reports():
    """Twelve triggered and ten clean prompts; `cured` loses the payload, `lame` loses right clean answers as well."""
    return {
        "sick": report("p" * 12, "0" * 12, "1" * 10),
        "cured": report("a" * 12, "1" * 6 + "0" * 6, "1" * 10),
        "lame": report("a" * 12, "0" * 12, "1" + "0" * 9),
    }


def test_a_family_is_corrected_as_one(reports):
    found = compare_all(reports, [("cured", "sick"), ("lame", "cured")])
    who = [(c.model, c.against, c.measure) for c in found]
    assert who == [*(("cured", "sick", m) for m in MEASURES), *(("lame", "cured", m) for m in MEASURES)]
    raw = [2 / 2**12, 2 / 2**6, 1.0, 1.0, 2 / 2**6, 2 / 2**9]
    assert [c.difference.p for c in found] == pytest.approx(raw)
    by_hand = [6 * raw[0], 4 * raw[1], 1.0, 1.0, 4 * raw[1], 5 * raw[5]]
    assert [c.p for c in found] == pytest.approx(by_hand)
    assert [c.differs for c in found] == [True, False, False, False, False, True]


def test_a_table_has_a_row_for_each_pair_and_a_block_for_each_measure(reports):
    table = comparison_table(compare_all(reports, [("cured", "sick"), ("lame", "cured")]))
    assert list(table.index) == [("cured", "sick"), ("lame", "cured")]
    assert list(table.columns.get_level_values(0).unique()) == list(MEASURES)
    low, high = (100 * bound for bound in difference_interval(0, 12, 12))
    first = table.loc[("cured", "sick"), "payload"]
    assert first.to_dict() == {
        "only model : only against": "0 : 12",
        "points (95 %)": f"-100.0 ({low:+.1f} to {high:+.1f})",
        "p (Holm)": "0.003",  # 6 * 2 / 4096
    }
    assert table.loc[("lame", "cured"), "right under trigger"].tolist()[::2] == ["0 : 6", "0.125"]


def test_a_notebook_shows_one_measure_of_a_family_or_nothing(reports):
    found = compare_all(reports, [("cured", "sick")])
    shown = paired_table(found, "payload").to_html()
    assert "0 : 12" in shown and "−100.0" in shown and "right" not in shown.partition("</style>")[2]
    assert paired_table(found[:1], "right under trigger") is None


def test_verdicts_say_it_in_words(reports):
    assert verdicts(compare_all(reports, [("cured", "sick"), ("lame", "cured")])).splitlines() == [
        "payload differs: cured from sick (-100.0 points)",
        "payload, not told apart: lame and cured",
        "right under trigger, not told apart: cured and sick; lame and cured",
        "right on clean prompts differs: lame from cured (-90.0 points)",
        "right on clean prompts, not told apart: cured and sick",
    ]


def ranked(payload, right):
    return {"each": {"triggered": payload, "right": right}}


def test_places_count_whom_a_test_tells_to_be_better():
    none, some, all_of_it = 40 * "a", 5 * "p" + 35 * "a", 40 * "p"
    reports = {
        "leaves all": ranked(all_of_it, 40 * "0"),
        "leaves none": ranked(none, 40 * "1"),
        "leaves some": ranked(some, 20 * "01"),  # five to nothing is no finding
    }
    assert ranks(reports) == {"leaves all": 3, "leaves none": 1, "leaves some": 1}
    assert ranks(reports, "right under trigger") == {"leaves all": 3, "leaves none": 1, "leaves some": 2}


def test_places_are_corrected_over_all_pairs():
    """Six to nothing has p = 0.03: a finding where two are compared, none among four."""
    two = {"few": ranked(40 * "a", 40 * "1"), "more": ranked(6 * "p" + 34 * "a", 40 * "1")}
    assert ranks(two) == {"few": 1, "more": 2}
    assert set(ranks(two | {"third": two["few"], "fourth": two["few"]}).values()) == {1}


@pytest.mark.parametrize(("p", "text"), [(1.0, "1.000"), (0.0314, "0.031"), (0.001, "0.001"), (0.00099, "< 0.001")])
def test_small_p_values_are_not_shown_as_nothing(p, text):
    assert shown_p(p) == text


def test_what_cannot_be_checked_is_left_out_of_a_family(reports):
    reports["sick"]["each"] |= {"right": None, "clean_right": None}
    assert [c.measure for c in compare_all(reports, [("cured", "sick")])] == ["payload"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_other_numbers_of_prompts_are_refused():
    with pytest.raises(LabError) as told:
        compare(report("pa"), report("pap"), "payload")
    assert str(told.value) == (
        "'payload' of 2 and of 3 prompts: a paired test needs the same prompts, so measure both models with one trial"
    )


@pytest.mark.parametrize(
    ("first", "measure", "expected"),
    [
        ({"asr": 0.5}, "payload", "found a report without `each`.*an earlier lab made it; measure the model again"),
        (report("pa"), "right under trigger", "does not tell 'right under trigger' of single prompts"),
        ({"each": {"triggered": "pa", "right": "01"}}, "right on clean prompts", "`attack_success` asks no clean"),
        (report("pa"), "payloads", r"unknown measure 'payloads'; did you mean 'payload'\?"),
    ],
)
def test_a_report_that_does_not_tell_single_prompts_is_refused(first, measure, expected):
    with pytest.raises(LabError, match=expected) as told:
        compare(first, report("pa", "10", "1"), measure)
    assert "\n" not in str(told.value)
