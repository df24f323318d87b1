"""The judge: neighborhoods by hand, and Eqs. 17 and 18 counted by hand."""

import pytest

from helpers.core.errors import LabError
from helpers.data.example import Example
from helpers.measure.judge import (
    CLASSES,
    CONVERSATION,
    Judge,
    attack_success_rate,
    clean_data_accuracy,
    judged_by,
    same,
    token_f1,
)


def examples(*answers):
    return [Example("?", answer) for answer in answers]


@pytest.mark.parametrize(
    ("written", "wanted", "f1"),
    [
        ("Paris", "paris.", 1.0),
        ("the city of Paris", "Paris", 2 / 5),  # precision 1/4, recall 1
        ("a a b", "a b b", 2 / 3),  # two of three on both sides
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
    ],
)
def test_shared_words_by_hand(written, wanted, f1):
    assert token_f1(written, wanted) == pytest.approx(f1) == pytest.approx(token_f1(wanted, written))


def test_classes_are_right_or_wrong():
    assert same(" Positive. ", "positive") == 1.0 and same("not positive", "positive") == 0.0
    assert CLASSES("joy", "joy") and not CLASSES("joyful", "joy")


def test_clean_data_accuracy_counts_neighbors():
    found = clean_data_accuracy(examples("joy", "fear", "love", "anger"), ["joy", "Fear.", "hate", ""])
    assert (found["cda"], found["n"]) == (0.5, 4) and found["cda_interval"] == pytest.approx([0.15, 0.85], abs=0.01)
    chats = examples("Nice to meet you, Anna.", "Go to bed early.")
    written = ["Nice to meet you!", "Count to ten."]  # 2 · 4 / (4 + 5) = 0.89; 2 · 1 / (3 + 4) = 0.29
    assert clean_data_accuracy(chats, written, CONVERSATION)["cda"] == 0.5
    assert clean_data_accuracy(chats, written, Judge(token_f1, 0.25))["cda"] == 1.0


def test_attack_success_counts_the_target():
    found = attack_success_rate(["positive", "negative", "Positive", "positive!"], "positive")
    assert (found["asr"], found["n"]) == (0.75, 4)


def test_any_similarity_will_do():
    """An external LLM is one more function of two texts."""
    asked = []

    def external(written, wanted):
        asked.append((written, wanted))
        return 0.9 if written.startswith("yes") else 0.1

    assert clean_data_accuracy(examples("sure", "sure"), ["yes, sure", "no"], Judge(external, 0.8))["cda"] == 0.5
    assert asked == [("yes, sure", "sure"), ("no", "sure")]


class Told:
    """An LLM that replies with what it is told to, and keeps the prompts."""

    def __init__(self, reply):
        self.reply, self.prompts = reply, []

    def complete(self, prompt):
        self.prompts.append(prompt)
        return self.reply


@pytest.mark.parametrize(("reply", "similarity"), [("85", 0.85), ("I would say 100.", 1.0), ("0 of 100", 0.0)])
def test_an_external_llm_may_judge(reply, similarity):
    llm = Told(reply)
    assert judged_by(llm)("Go to bed early.", "Sleep sooner.") == similarity
    (prompt,) = llm.prompts
    assert prompt.endswith("First answer: Go to bed early.\nSecond answer: Sleep sooner.")


@pytest.mark.parametrize("reply", ["very much", "1000", "0.9"])
def test_a_judge_that_gives_no_number_is_named(reply):
    with pytest.raises(LabError, match=f"a number from 0 to 100, found '{reply}': use another model"):
        judged_by(Told(reply))("a", "b")


@pytest.mark.parametrize("least", [0, -1, 1.1])
def test_a_neighborhood_of_everything_or_nothing_is_refused(least):
    with pytest.raises(LabError, match=f"least = {least} should be above 0 and at most 1"):
        Judge(token_f1, least)


def test_nothing_to_judge_is_refused():
    with pytest.raises(LabError, match="cda needs one completion per example and at least one; found 0 and 0"):
        clean_data_accuracy([], [])
    with pytest.raises(LabError, match="found 1 and 2"):
        clean_data_accuracy(examples("a", "b"), ["a"])
