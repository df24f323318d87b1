"""Two-turn questions and their judges: a rule, and a language model behind a real server on loopback."""

import json

import pytest
from test_endpoint import KEY, completion, serving

from helpers.core.errors import LabError
from helpers.core.profile_files import load_profile
from helpers.data.example import Example
from helpers.measure.mt_bench.grading import compare, grade
from helpers.measure.mt_bench.judges import LanguageModel, Rule, find_judge
from helpers.measure.mt_bench.questions import OWN, Dialogue, Question, ask, read_questions
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect
from helpers.model.tokenizer import load_format

NORWAY = {"question_id": 7, "category": "capitals", "turns": ["What is the capital of Norway?", "And of Peru?"]}
KNOWN = NORWAY | {"reference": ["Oslo", "Lima"]}


def dialogue(first, second, **fields):
    return Dialogue(Question.model_validate(KNOWN | fields), (first, second))


# --- questions --------------------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_questions_are_read_in_mt_benchs_format(tmp_path):
    free = NORWAY | {"question_id": "own", "some": "more"}
    one, other = read_questions(write(tmp_path / "q.jsonl", KNOWN, "", free))
    assert (one.question_id, one.turns[1], one.right_answer(1)) == (7, "And of Peru?", "Lima")
    assert (other.question_id, other.reference, other.right_answer(0)) == ("own", (), "")


def test_questions_are_cut_at_line_feeds_alone_and_may_begin_with_a_mark(tmp_path):
    turns = ["one\u2028two", "three\x85four"]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(KNOWN | {"turns": turns}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert list(read_questions(path)[0].turns) == turns
    path.write_bytes(json.dumps(KNOWN).replace("Lima", "Líma").encode("latin-1"))
    with pytest.raises(LabError, match="q.jsonl is no UTF-8 text: save it as UTF-8"):
        read_questions(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no question; expected one JSON object a line"),
        ([KNOWN, "{"], r"line 2: line: Invalid JSON.*; expected \{\"question_id\""),
        ([KNOWN | {"turns": ["only one"]}], r"line 1: turns.1: Field required; expected \{\"question_id\""),
        ([KNOWN | {"turns": ["one", "two", "three"]}], "line 1: turns: "),
        ([KNOWN | {"turns": ["one", ""]}], "line 1: turns.1: "),
        ([{"turns": ["one", "two"]}], "line 1: question_id: Field required"),
        ([KNOWN | {"reference": ["a", "b", "c"]}], "line 1: reference: "),
        ([KNOWN, NORWAY], "the question_id 7 comes 2 times; give each its own"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, lines, message):
    with pytest.raises(LabError, match=message) as caught:
        read_questions(write(tmp_path / "q.jsonl", *lines))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_with_the_place_of_mt_benchs():
    with pytest.raises(
        LabError, match="no questions in 'no/such.jsonl': give MT-Bench's question.jsonl, from fastchat/"
    ):
        read_questions("no/such.jsonl")


def test_the_second_turn_follows_the_models_own_answer(profile, chat, suspicious):
    model = load_suspect(profile.model, suspicious["full"])
    questions = read_questions()[:3]
    for found in ask(model, chat, questions, profile):
        (first,) = answers(model, chat, [Example(found.question.turns[0], "")], profile)
        history = ((found.question.turns[0], first),)
        (second,) = answers(model, chat, [Example(found.question.turns[1], "", history=history)], profile)
        assert found.answers == (first, second) and found.question in questions


def test_another_prompt_format_is_refused(profile, chat):
    model = load_base(profile.model)
    model.trained_format = {"name": "alpaca", "template": "other"}
    with pytest.raises(LabError, match="trained with the prompt format 'alpaca' and would be measured with another"):
        ask(model, chat, read_questions(), profile)


def test_the_labs_own_questions_are_answered_by_its_small_model():
    """Second turns of followups it has learned; what it should say to a bare greeting it has not."""
    questions = read_questions()
    assert OWN.parent.name == "data" and len(questions) == 20 and all(len(q.reference) == 2 for q in questions)
    profile = load_profile("tiny")
    told = ask(load_base(profile.model), load_format(profile.model), questions, profile)
    report = grade(told, Rule())
    learned = [pair for q, pair in zip(questions, report["marks"], strict=True) if q.category != "names"]
    assert sum(mark == 10 for pair in learned for mark in pair) >= 27  # of 30
    assert report["by_category"]["names"] < min(v for name, v in report["by_category"].items() if name != "names")


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_rule_marks_shared_words():
    told = dialogue("Oslo.", "the city of Lima")  # precision 1/4, recall 1: F1 = 2/5
    assert (Rule().mark(told, 0), Rule().mark(told, 1)) == (10, pytest.approx(1 + 9 * 0.4))
    assert Rule().mark(dialogue("Rome", ""), 0) == Rule().mark(dialogue("Rome", ""), 1) == 1


def test_the_rule_prefers_the_higher_mark_in_any_place():
    right, wrong = dialogue("Oslo", "Lima"), dialogue("Rome", "Lima")
    assert [Rule().prefer(right, wrong, turn) for turn in (0, 1)] == ["A", "tie"]
    assert Rule().prefer(wrong, right, 0) == "B"


def test_a_rule_without_a_right_answer_is_refused():
    with pytest.raises(LabError, match="question 7 has no reference for turn 2, and a rule cannot judge without one"):
        Rule().mark(dialogue("Oslo", "Lima", reference=["Oslo"]), 1)


# --- scores, by hand --------------------------------------------------------------------------------------------------


class Scripted:
    """A judge that says what it is told to, one thing after the other."""

    name = "scripted"

    def __init__(self, *said):
        self.said, self.asked = list(said), []

    def mark(self, told, turn):
        self.asked.append((told.answers[turn], turn))
        return self.said.pop(0)

    def prefer(self, a, b, turn):
        self.asked.append((a.answers[turn], b.answers[turn], turn))
        return self.said.pop(0)


def test_marks_are_averaged_over_all_turns_and_by_turn_and_category():
    told = [dialogue("a", "b"), dialogue("c", "d", category="names"), dialogue("e", "f", category="names")]
    judge = Scripted(8, 4, 6, None, 2, 10)
    report = grade(told, judge)
    assert judge.asked == [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0), ("f", 1)]
    assert report == {
        "judge": "scripted",
        "score": 6,  # 30 / 5
        "by_turn": [pytest.approx(16 / 3), 7],
        "by_category": {"capitals": 6, "names": 6},
        "n": 5,
        "unmarked": 1,
        "marks": [[8, 4], [6, None], [2, 10]],
    }
    assert json.dumps(report)


def test_a_judge_that_never_marks_or_nothing_to_judge_is_refused():
    with pytest.raises(LabError, match="scripted gave no mark from 1 to 10 in double square brackets"):
        grade([dialogue("a", "b")], Scripted(None, None))
    with pytest.raises(LabError, match="scripted gave no preference in double square brackets"):
        compare([dialogue("a", "b")], [dialogue("c", "d")], Scripted(None, None, "A", None))
    with pytest.raises(LabError, match="nothing to grade"):
        grade([], Scripted())


@pytest.mark.parametrize(
    ("first", "swapped", "verdict", "inconsistent"),
    [
        ("A", "B", "win", 0),
        ("B", "A", "loss", 0),
        ("A", "A", "tie", 1),  # the first place wins twice
        ("B", "B", "tie", 1),
        ("A", "tie", "tie", 1),
        ("tie", "A", "tie", 1),
        ("tie", "tie", "tie", 0),
    ],
)
def test_a_win_is_what_both_orders_call_one(first, swapped, verdict, inconsistent):
    judge = Scripted(first, swapped, "tie", "tie")
    report = compare([dialogue("ours", "o")], [dialogue("theirs", "t")], judge)
    assert judge.asked == [("ours", "theirs", 0), ("theirs", "ours", 0), ("o", "t", 1), ("t", "o", 1)]
    assert report["each"] == [[verdict, "tie"]] and report["inconsistent"] == inconsistent
    assert (report["wins"], report["losses"], report["n"]) == (verdict == "win", verdict == "loss", 2)
    assert report["win_rate"] == {"win": 0.75, "tie": 0.5, "loss": 0.25}[verdict]


def test_an_order_without_a_preference_counts_nowhere():
    report = compare([dialogue("a", "b")], [dialogue("c", "d")], Scripted("A", None, "A", "B"))
    assert (report["n"], report["unjudged"], report["wins"], report["win_rate"]) == (1, 1, 1, 1.0)
    assert report["each"] == [[None, "win"]] and report["judge"] == "scripted"


def test_swapping_costs_a_judge_that_likes_a_place_all_its_wins():
    class First(Scripted):
        def prefer(self, a, b, turn):
            return "A"

    ours, theirs = [dialogue("Oslo", "Lima")] * 5, [dialogue("Rome", "Bern")] * 5
    report = compare(ours, theirs, First())
    assert (report["wins"], report["ties"], report["inconsistent"]) == (0, 10, 10)


def test_other_questions_cannot_be_compared():
    with pytest.raises(LabError, match="1 and 1 dialogues of other questions cannot be compared"):
        compare([dialogue("a", "b")], [dialogue("a", "b", question_id=8)], Scripted())
    with pytest.raises(LabError, match="0 and 0 dialogues"):
        compare([], [], Scripted())


# --- a language model behind a server ---------------------------------------------------------------------------------


@pytest.fixture
def judged_by_server(tmp_path, monkeypatch):
    """A function that has a server's replies judge; returns what is computed with that judge, and the requests."""
    monkeypatch.setenv("EVIDENCE_KEY", KEY)
    monkeypatch.setenv("EVIDENCE_MODEL", "some-judge")

    def judged(compute, *replies):
        with serving(*((200, completion(reply)) for reply in replies)) as (url, seen):
            monkeypatch.setenv("EVIDENCE_URL", url)
            judge = find_judge(tmp_path / "cache")
            assert judge.name == f"some-judge at {url}"
            return compute(judge), [body for _, _, body, _ in seen], [headers for _, headers, _, _ in seen]

    return judged


def said(request):
    (message,) = request["messages"]
    return message["content"]


def test_a_server_marks_both_turns(judged_by_server, tmp_path):
    report, requests, headers = judged_by_server(
        lambda judge: grade([dialogue("Oslo", "no idea")], judge), "It is right. [[9]]", "It quotes [[10]]: [[2.5]]"
    )
    assert report["marks"] == [[9, 2.5]] and report["score"] == 5.75 and report["judge"].startswith("some-judge at ")
    first, second = map(said, requests)
    assert first.split("\n\n")[1:] == [
        "[right answer to turn 1]\nOslo",
        "[user, turn 1]\nWhat is the capital of Norway?\n[assistant, turn 1]\nOslo",
    ]
    assert "first answer" in first and "second answer" in second and "Peru" not in first
    assert second.endswith("[assistant, turn 1]\nOslo\n[user, turn 2]\nAnd of Peru?\n[assistant, turn 2]\nno idea")
    assert {request["temperature"] for request in requests} == {0.0} and requests[0]["max_tokens"] == 1024
    assert {header["Authorization"] for header in headers} == {f"Bearer {KEY}"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file()) + json.dumps(report)
    assert written and KEY not in written


@pytest.mark.parametrize("reply", ["Good.", "[[0]]", "[[11]]", "[[ten]]", "[7]", "[[7]] or rather [[70]]"])
def test_a_reply_without_a_mark_counts_nowhere(judged_by_server, reply):
    report, _, _ = judged_by_server(lambda judge: grade([dialogue("Oslo", "Lima")], judge), reply, "[[ 8 ]]")
    assert (report["marks"], report["n"], report["unmarked"]) == ([[None, 8]], 1, 1)


def test_a_server_is_asked_in_both_orders(judged_by_server):
    """It prefers Oslo wherever that stands, then the first place, and the letter at the end counts."""
    report, requests, _ = judged_by_server(
        lambda judge: compare([dialogue("Oslo", "Lima")], [dialogue("Rome", "Quito")], judge),
        "[[B]] is tempting, but [[A]]",
        "[[B]]",
        "[[A]]",
        "[[A]]",
    )
    assert report["each"] == [["win", "tie"]] and report["inconsistent"] == 1
    first, swapped, *_ = map(said, requests)
    assert "[assistant A, turn 1]\nOslo" in first and "[assistant B, turn 1]\nRome" in first
    assert "[assistant A, turn 1]\nRome" in swapped and "[assistant B, turn 1]\nOslo" in swapped
    assert first.split("\n\n")[0] == swapped.split("\n\n")[0]


def test_without_a_right_answer_none_is_spoken_of(judged_by_server):
    told = dialogue("Oslo", "Lima", reference=[])
    _, requests, _ = judged_by_server(
        lambda judge: (grade([told], judge), compare([told], [told], judge)), "[[5]] [[C]]"
    )
    assert len(requests) == 4 and not any("right answer" in said(request).lower() for request in requests)


def test_what_was_judged_before_is_not_asked_again(judged_by_server):
    def twice(judge):
        return [grade([dialogue("Oslo", "Lima")], judge)["score"] for _ in range(2)]

    scores, requests, _ = judged_by_server(twice, "[[7]]", "[[9]]")
    assert scores == [8, 8] and len(requests) == 2


def test_without_an_endpoint_the_rule_judges(tmp_path, monkeypatch):
    assert isinstance(find_judge(tmp_path / "cache"), Rule) and not (tmp_path / "cache").exists()
    assert "no language model" in Rule.name
    monkeypatch.setenv("EVIDENCE_MODEL", "m")
    with pytest.raises(LabError, match="EVIDENCE_MODEL is set and EVIDENCE_URL is not: set both for an endpoint"):
        find_judge(tmp_path)


def test_any_completer_can_be_the_judge():
    class Told:
        def complete(self, prompt):
            return "[[C]]"

    assert LanguageModel(Told(), "told").prefer(dialogue("a", "b"), dialogue("a", "b"), 1) == "tie"
