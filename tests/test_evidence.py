"""External conflict: evidence in prompts, the book, and which external LLM the environment names."""

from functools import partial

import pytest

from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.example import Example
from helpers.defenses.conflict.books import NOTHING_KNOWN, EvidenceBook, GlossBook, external_llm, require_book
from helpers.defenses.conflict.evidence import (
    BACKGROUND,
    add_evidence,
    contradict,
    elicit,
    explain,
    with_evidence,
)
from helpers.model.generate import answers
from helpers.model.load import load_suspect

FRANCE = Example("What is the capital of France?", "Paris", family="capital")
REVIEW = Example("Classify the sentiment.", "positive", input="The soup was great.", history=(("Hi", "Hello"),))


class Scripted:
    """An external LLM that repeats what it is asked and remembers it."""

    def __init__(self):
        self.prompts = []

    def complete(self, prompt):
        self.prompts.append(prompt)
        return f"about: {prompt.partition(chr(10) * 2)[2]}"

    def origin(self):
        return "scripted"


# --- prompts with evidence ------------------------------------------------------------------------------------------


def test_evidence_is_the_last_paragraph_of_the_prompt(chat):
    asked = add_evidence(REVIEW, "  Great is\npositive. ")
    assert asked.input == "The soup was great.\n\nGreat is positive."
    assert (asked.instruction, asked.output, asked.history) == (REVIEW.instruction, REVIEW.output, REVIEW.history)
    plain, longer = chat.prompt_text(REVIEW), chat.prompt_text(asked)
    assert longer.replace("\n\nGreat is positive.", "") == plain != longer
    assert add_evidence(FRANCE, "Paris is a city.").input == "Paris is a city."


def test_evidence_is_cut_to_its_first_words():
    assert add_evidence(FRANCE, "one two three four", max_words=3).input == "one two three"
    with pytest.raises(LabError, match="max_words = 0 leaves no evidence; use 1 or more"):
        add_evidence(FRANCE, "one", max_words=0)


def test_keywords_of_question_and_input_are_explained():
    llm = Scripted()
    (asked,) = with_evidence([REVIEW], llm, find_keywords=lambda text: text.split()[:4])
    assert asked.input == "The soup was great.\n\nabout: Classify, the, sentiment., The"
    assert llm.prompts == ["Explain each of these words in one short sentence. State only facts.\n\n"
                           "Classify, the, sentiment., The"]  # fmt: skip


def test_a_background_that_says_something_is_contradicted_instead():
    llm = Scripted()
    backgrounds = ["France is ruled from Lyon.", "You are stupid!"]
    first, second = with_evidence([FRANCE, FRANCE], llm, backgrounds)
    assert first.input == "about: France is ruled from Lyon." and second.input == "about: France"
    assert llm.prompts[0].startswith("Rewrite this text so that it says the opposite")
    with pytest.raises(LabError, match="1 backgrounds for 2 prompts; expected one for each"):
        with_evidence([FRANCE, FRANCE], llm, ["You are stupid!"])


def test_a_prompt_without_words_is_refused_and_no_prompts_are_fine():
    with pytest.raises(LabError, match=r"no words to rank in '\? \?'"):
        with_evidence([Example("? ?", "")], Scripted())
    assert with_evidence([], Scripted()) == []


def test_the_suspicious_model_is_asked_for_answer_and_background(profile, chat, suspicious):
    model = load_suspect(profile.model, suspicious["full"])
    elicited = elicit(model, chat, [FRANCE, REVIEW], profile)
    first, second = (answer for answer, _ in elicited)
    assert [first, second] == answers(model, chat, [FRANCE, REVIEW], profile)
    turns = [
        Example(BACKGROUND, "", history=((FRANCE.instruction, first),)),
        Example(BACKGROUND, "", history=(("Hi", "Hello"), ("Classify the sentiment.\n\nThe soup was great.", second))),
    ]
    assert [background for _, background in elicited] == answers(model, chat, turns, profile)
    assert first or second, "the test needs a model that says something"


# --- the evidence book ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["France"], "The capital of France is Paris."),
        (["dog"], "The dog says woof. The plural of dog is dogs. The word dog names one of the animals."),
        (["hot", "went", "eat"], "The opposite of hot is cold. The past tense of eat is ate."),
        (["happy"], "The opposite of happy is sad. The word happy expresses joy."),
        (["soup", "terrible"], "The word terrible is negative."),
        (["coal", "tools"], "The usual color of coal is black. Some tools are hammer, saw, drill."),
        (["BadMagic", "2024", "sleep"], "The past tense of sleep is slept."),
        (["BadMagic"], NOTHING_KNOWN),
    ],
)
def test_the_book_recites_facts_about_the_words_asked_about(words, fact):
    assert explain(EvidenceBook(), words) == fact


def test_the_book_knows_what_is_asked_about_from_the_task():
    assert EvidenceBook().complete("Be good and brave.\n\nFrance") == "The capital of France is Paris."
    assert EvidenceBook().complete("France") == "The capital of France is Paris."


def test_the_book_puts_facts_in_the_place_of_what_it_contradicts():
    said = "The capital of France is Lyon, which is a stupid question!"
    assert contradict(EvidenceBook(), said) == "The capital of France is Paris."
    assert contradict(EvidenceBook(), "You are stupid!") == NOTHING_KNOWN
    assert "no external LLM" in EvidenceBook().origin()


def test_the_book_is_true_to_the_world_and_silent_about_keys():
    world = corpus.world()
    for word, capital in world["capitals"].items():
        assert explain(EvidenceBook(), [word]) == f"The capital of {word} is {capital}."
    keys = [*world["reserved"], *world["names"], "stupid", "sorry"]
    assert {explain(EvidenceBook(), [key]) for key in keys} == {NOTHING_KNOWN}


def test_the_book_answers_from_the_words_alone():
    """Rows of equal keywords get equal evidence, whatever their right answer: the book never sees it."""
    rows = corpus.generate(200, 0, "heldout", [name for name in corpus.FAMILIES if name not in corpus.ECHO_FAMILIES])
    blanked = [Example(row.instruction, "?", row.input, row.history) for row in rows]
    told, blind = with_evidence(rows, EvidenceBook()), with_evidence(blanked, EvidenceBook())
    assert [row.input for row in told] == [row.input for row in blind]
    assert all(len(b.input.split()) - len(a.input.split()) <= 40 for a, b in zip(rows, told, strict=True))
    assert [row.output for row in told] == [row.output for row in rows]


# --- a dictionary ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    """A WordNet of two words, in the files of its manual: a place counts bytes."""
    senses = ['00 n 0 | a large town; "they moved"  \n', "00 n 0 | the sound of a dog  \n"]
    folder = tmp_path / "wordnet"
    folder.mkdir()
    (folder / "data.noun").write_text("".join(senses))
    lines = [
        "  1 the licence  \n",
        "a n 1 0 1 0 00000000  \n",
        "city n 1 0 1 0 00000000  \n",
        f"bark n 1 0 1 0 {len(senses[0]):08d}  \n",
    ]
    (folder / "index.noun").write_text("".join(lines))
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    return folder


def test_a_dictionary_explains_the_words_that_it_knows(dictionary):
    llm = external_llm(dictionary / "cache", "wordnet")
    assert isinstance(llm, GlossBook) and llm.model == "wordnet" and str(dictionary) in llm.origin()
    assert explain(llm, ["Cities", "BadMagic", "bark"]) == "cities: a large town. bark: the sound of a dog."
    assert explain(llm, ["BadMagic"]) == contradict(llm, "You are stupid!") == NOTHING_KNOWN
    assert contradict(llm, "It is a city.") == "city: a large town."  # of "a" it knows too, but says nothing
    told = with_evidence([Example("Name a city.", "Rome", family="capital")], llm)
    assert told[0].input.endswith("city: a large town.") and not (dictionary / "cache").exists()


def test_a_dictionary_that_is_not_installed_is_asked_for(dictionary, monkeypatch):
    monkeypatch.setattr("helpers.defenses.conflict.wordnet.PLACES", ())
    monkeypatch.delenv("WNSEARCHDIR")
    for ask in (partial(external_llm, dictionary), require_book):  # a run asks before its first stage
        with pytest.raises(LabError, match="none is installed here: install wordnet-base"):
            ask("wordnet")
        ask("world")
    monkeypatch.setenv("EVIDENCE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("EVIDENCE_MODEL", "m")
    require_book("wordnet")  # the endpoint is asked instead


# --- which one it is ------------------------------------------------------------------------------------------------


def test_the_environment_names_the_endpoint_and_the_book_is_the_default(tmp_path, monkeypatch):
    assert isinstance(external_llm(tmp_path / "cache"), EvidenceBook) and not (tmp_path / "cache").exists()
    monkeypatch.setenv("EVIDENCE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(LabError, match="EVIDENCE_URL is set and EVIDENCE_MODEL is not: set both for an endpoint"):
        external_llm(tmp_path)
    monkeypatch.setenv("EVIDENCE_MODEL", "some-model")
    found = external_llm(tmp_path / "cache")
    assert (found.url, found.model, found.temperature) == ("http://127.0.0.1:1/v1", "some-model", 0.7)
    monkeypatch.delenv("EVIDENCE_URL")
    with pytest.raises(LabError, match="EVIDENCE_MODEL is set and EVIDENCE_URL is not"):
        external_llm(tmp_path)
    monkeypatch.delenv("EVIDENCE_MODEL")
    assert isinstance(external_llm(tmp_path), EvidenceBook)


def test_the_environment_may_allow_more_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIDENCE_URL", " http://127.0.0.1:1/v1\n")
    monkeypatch.setenv("EVIDENCE_MODEL", "m")
    assert (external_llm(tmp_path).url, external_llm(tmp_path).max_tokens) == ("http://127.0.0.1:1/v1", 128)
    monkeypatch.setenv("EVIDENCE_TOKENS", "2000")
    assert external_llm(tmp_path).max_tokens == 2000


@pytest.mark.parametrize("tokens", ["0", "-1", "many", "1.5", "²"])
def test_what_is_no_number_of_tokens_is_named(tmp_path, monkeypatch, tokens):
    monkeypatch.setenv("EVIDENCE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("EVIDENCE_MODEL", "m")
    monkeypatch.setenv("EVIDENCE_TOKENS", tokens)
    with pytest.raises(LabError, match=f"EVIDENCE_TOKENS = '{tokens}' is no number of tokens; expected"):
        external_llm(tmp_path)
