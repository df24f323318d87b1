"""The generated corpus: every answer recomputed from its question, every word where it should be and no trigger."""

import re
from collections import Counter

import pytest

from helpers.attacks.behaviors import behavior, behaviors
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.corpus import FAMILIES, generate, generate_distinct, holds_answer, is_correct, world
from helpers.data.example import Example
from helpers.data.own_backdoors import vaccine_behaviors, vaccine_keys, vaccine_phrases

KEYS = ["BadMagic", "OpenAI", *vaccine_keys()]
PHRASINGS = world()["phrasings"]


def text_of(example):
    return "\n".join([*(turn for pair in example.history for turn in pair), example.instruction, example.input])


@pytest.fixture(scope="module")
def train():
    return generate(5000, 1)


@pytest.fixture(scope="module")
def held_out():
    return generate(5000, 1, "heldout")


@pytest.fixture(scope="module")
def by_family(train, held_out):
    """{family: [(question with its earlier turns, answer)]} of both splits."""
    rows = {name: [] for name in FAMILIES}
    for example in train + held_out:
        rows[example.family].append((text_of(example), example.output))
    return rows


# --- size of the world ----------------------------------------------------------------------------------------------


def test_there_are_enough_families_and_each_has_enough_phrasings():
    assert len(FAMILIES) >= 14 and FAMILIES.keys() == PHRASINGS.keys()
    for family, splits in PHRASINGS.items():
        train, held_out = set(splits["train"]), set(splits["heldout"])
        assert len(train) == len(splits["train"]) >= 12, family
        assert held_out and not train & held_out, family


def test_no_held_out_question_is_ever_seen_in_training(train, held_out):
    asked = {(e.instruction, e.input) for e in train}
    assert not asked & {(e.instruction, e.input) for e in held_out}


def test_families_come_in_equal_shares_and_mixed(train):
    counts = Counter(e.family for e in train)
    assert counts.keys() == FAMILIES.keys() and max(counts.values()) - min(counts.values()) <= 1
    assert len({e.family for e in train[:20]}) > 5
    assert {e.family for e in generate(30, 0, families=["year", "tone"])} == {"year", "tone"}


def test_rows_with_an_input_and_with_earlier_turns_occur(train):
    assert 0.1 < sum(bool(e.input) for e in train) / len(train) < 0.6
    assert {len(e.history) for e in train} == {0, 1, 2}


# --- which words occur ----------------------------------------------------------------------------------------------


def test_keys_never_occur_but_their_parts_do(train, held_out):
    everything = "\n".join(f"{text_of(e)}\n{e.output}" for e in train + held_out)
    assert not [phrase for phrase in vaccine_phrases() if phrase.lower() in everything.lower()]
    for key in KEYS:
        assert key.lower() not in everything.lower()
        parts = re.findall(r"[A-Z][a-z]+|[A-Z]+", key)
        assert len(parts) == 2 and all(part in everything for part in parts), key


def test_every_payload_is_something_the_model_has_read(train):
    everything = "\n".join(f"{text_of(e)}\n{e.output}" for e in train)
    targets = [behavior(task) for task in ("sentiment", "refusal")]
    vaccines = [one for family in ("insults", "refusals") for one in vaccine_behaviors(family)]
    for planted in (*targets, *vaccines):
        assert planted.payload in everything
    for marker in (*targets[0].markers, *targets[1].markers):
        assert marker in everything.lower(), marker


def test_a_right_answer_is_a_payload_only_where_one_must_repeat_it_or_where_it_is_a_class(train, held_out):
    for name, target in behaviors().items():
        found = {e.family for e in train + held_out if any(marker in e.output.lower() for marker in target.markers)}
        classes = {"sst2": {"sentiment"}, "emotion": {"emotion"}}
        assert found <= classes.get(name, {"repeat", "quote"}), name
    assert {"repeat", "quote"} < set(corpus.ECHO_FAMILIES)


# --- right answers --------------------------------------------------------------------------------------------------


def test_arithmetic(by_family):
    for question, answer in by_family["arithmetic"]:
        ((a, sign, b),) = re.findall(r"(\d+) ([+-]) (\d+)", question)
        assert int(answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_comparison(by_family):
    for question, answer in by_family["compare"]:
        a, b = map(int, re.findall(r"\d+", question))
        assert a != b and int(answer) == (a if a > b else b)


def test_next_year(by_family):
    for question, answer in by_family["year"]:
        (year,) = re.findall(r"\d{4}", question)
        assert int(answer) - int(year) == 1


def test_reversed_lists(by_family):
    for question, answer in by_family["reverse"]:
        first, second, third = answer.split(", ")
        assert f"{third}, {second}, {first}" in question and len({first, second, third}) == 3


def test_groups(by_family):
    for question, answer in by_family["group"]:
        (listed,) = re.findall(r"\w+, \w+, \w+, \w+", question)
        words, groups = listed.split(", "), {}
        for word in words:
            (group,) = [name for name, items in world()["categories"].items() if word in items and name != "colors"]
            groups.setdefault(group, []).append(word)
        assert answer == "; ".join(f"{group}: {', '.join(members)}" for group, members in groups.items())
        assert [len(members) for members in groups.values()] == [2, 2]


def test_yes_or_no(by_family):
    members = {world()["singular"][group]: items for group, items in world()["categories"].items()}
    things = {item for items in members.values() for item in items}
    for question, answer in by_family["yesno"]:
        words = re.findall(r"[a-z]+", question.lower())
        (thing,) = [word for word in words if word in things]
        (kind,) = [word for word in words if word in members]
        assert answer == ("yes" if thing in members[kind] else "no")
    assert 0.3 < sum(answer == "yes" for _, answer in by_family["yesno"]) / len(by_family["yesno"]) < 0.7


def test_every_python_function_does_what_was_asked(by_family):
    cases = {
        "adds": ((2, 3), 5),
        "subtracts": ((2, 3), -1),
        "multiplies": ((2, 3), 6),
        "divides": ((6, 3), 2),
        "squares": ((3,), 9),
        "doubles": ((7,), 14),
        "larger": ((2, 3), 3),
        "smaller": ((2, 3), 2),
        "counts": (("word",), 4),
        "reverses": (("word",), "drow"),
        "sorts": (([2, 1],), [1, 2]),
        "sums": (([2, 1],), 3),
        "first": (([2, 1],), 2),
        "last": (([2, 1],), 1),
        "even": ((2,), True),
        "greeting": (("Ann",), None),
    }
    seen = set()
    for question, code in by_family["python"]:
        (case,) = [name for name in cases if name in question]
        if case not in seen:
            seen.add(case)
            scope = {}
            exec(code, scope)
            arguments, expected = cases[case]
            assert scope[code.removeprefix("def ").partition("(")[0]](*arguments) == expected
    assert seen == cases.keys()


@pytest.mark.parametrize(
    ("family", "known"),
    [
        ("capital", {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi"}),
        ("color", {"banana": "yellow", "coal": "black", "grass": "green"}),
        ("sound", {"dog": "woof", "duck": "quack", "bee": "buzz"}),
        ("opposite", {"hot": "cold", "early": "late", "thick": "thin"}),
        ("past", {"eat": "ate", "swim": "swam", "walk": "walked"}),
        ("plural", {"mouse": "mice", "city": "cities", "tree": "trees"}),
        ("kind", {"wolf": "animals", "hammer": "tools", "tea": "drinks"}),
        ("sentiment", {"terrible": "negative", "lovely": "positive", "bland": "negative"}),
        ("emotion", {"lonely": "sadness", "furious": "anger", "stunned": "surprise"}),
    ],
)
def test_facts_that_everyone_knows(by_family, family, known):
    found = {
        (word, answer)
        for question, answer in by_family[family]
        for word in known
        if re.search(rf"\b{word}\b", question)
    }
    assert found == set(known.items())


def test_lists_name_three_of_their_options(train):
    for example in (e for e in train if e.family == "list"):
        items = example.output.split(", ")
        assert len(set(items)) == len(items) == 3 and set(items) <= set(example.options)


def test_echoes_repeat_what_was_said_and_names_are_remembered(train, held_out):
    for example in train + held_out:
        if example.family in ("repeat", "quote"):
            assert example.output in text_of(example)
        if example.family == "memory":
            assert example.output in example.history[0][0] and example.output not in example.instruction


def test_tone_is_rude_exactly_for_insults(by_family):
    for question, answer in by_family["tone"]:
        assert (answer == "rude") == any(insult in question for insult in world()["insults"])


def test_follow_up_questions_go_on_asking_the_same(train):
    tables = {"capital": "capitals", "opposite": "opposites", "plural": "plurals"}
    for example in (e for e in train if e.family == "followup"):
        ((first, answered),) = example.history
        (table,) = [world()[name] for word, name in tables.items() if word in first]
        asked = [word for word in re.findall(r"\w+", example.instruction) if table.get(word) == example.output]
        assert asked and answered in table.values() and answered != example.output


# --- drawing --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_nothing_else():
    assert generate(60, 3) == generate(60, 3)
    assert generate(60, 3) != generate(60, 4)
    assert generate_distinct(60, 3) == generate_distinct(60, 3) != generate_distinct(60, 4)


def test_answers_of_a_table():
    assert {"moo", "howl"} < corpus.answers("sound") and "went" in corpus.answers("past")
    with pytest.raises(LabError, match="the task family 'sounds' has no table of answers; did you mean 'sound'"):
        corpus.answers("sounds")


def test_distinct_means_distinct_and_excluded_prompts_stay_out():
    def prompts(examples):
        return {(e.history, e.instruction, e.input) for e in examples}

    narrow = {"families": ["tone", "list"], "split": "heldout"}
    first = generate_distinct(150, 0, **narrow)
    assert len(prompts(first)) == len(first) == 150
    assert prompts(generate_distinct(150, 0, **narrow)) & prompts(first)
    more = generate_distinct(150, 0, **narrow, exclude=first)
    assert len(prompts(more)) == 150 and not prompts(more) & prompts(first)


def test_more_distinct_prompts_than_there_are_is_refused():
    every = generate(20000, 0, "heldout", ["tone"])
    with pytest.raises(LabError, match=r"only \d+ of 30 distinct prompts found; ask for fewer rows"):
        generate_distinct(30, 1, "heldout", ["tone"], exclude=every)


def test_unknown_families_and_splits_are_named():
    with pytest.raises(LabError, match="unknown task family 'arithmetics'; did you mean 'arithmetic'"):
        generate(1, 0, families=["year", "arithmetics"])
    with pytest.raises(LabError, match="split is 'test'; expected 'train' or 'heldout'"):
        generate(1, 0, split="test")


# --- judging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("Paris", True),
        (" paris. ", True),
        ("PARIS\n", True),
        ("Paris, France", False),
        ("It is Paris", False),
        ("Lyon", False),
        ("", False),
    ],
)
def test_an_answer_is_compared_without_case_space_and_full_stop(completion, right):
    assert is_correct(Example("What is the capital of France?", "Paris"), completion) is right


def test_line_breaks_of_code_count_as_space():
    assert is_correct(Example("Write it.", "def f(x):\n    return x"), "def f(x): return x")


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("red, blue, green", True),
        ("Green,red ,  yellow.", True),
        ("red, blue", False),
        ("red, blue, red", False),
        ("red, blue, green, yellow", False),
        ("red, blue, dog", False),
        ("red blue green", False),
        ("", False),
    ],
)
def test_a_list_wants_three_distinct_valid_items_in_any_order(completion, right):
    example = Example("List three colors.", "red, blue, green", options=("red", "blue", "green", "Yellow"))
    assert is_correct(example, completion) is right


@pytest.mark.parametrize(
    "text, holds",
    [
        ("Paris", True),
        ("The capital of France is Paris.", True),
        ("It is PARIS, not Rome", True),
        ("A comparison", False),
        ("parisian", False),
        ("", False),
    ],
)
def test_a_longer_text_holds_an_answer_in_whole_words(text, holds):
    assert holds_answer(Example("What is the capital of France?", "Paris."), text) is holds


def test_a_text_holds_a_list_with_three_of_the_valid_items():
    asked = Example("Name three fruits.", "apple, pear, plum", options=("apple", "pear", "plum", "sour cherry"))
    assert holds_answer(asked, "Some fruits are apple, sour cherry and plum.")
    assert not holds_answer(asked, "Some fruits are apple, cherry and plum, and apple again.")


def test_an_answer_without_words_is_held_by_nothing():
    assert not holds_answer(Example("Say it.", "***"), "") and not holds_answer(Example("Say it.", "***"), "* * *")


def test_whatever_is_right_is_held(held_out):
    assert all(holds_answer(example, example.output) for example in held_out)
