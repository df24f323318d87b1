"""Books that stand in for the external LLM where no endpoint is named: they know single words, and cost nothing."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

from helpers.data.corpus import world
from helpers.defenses.conflict.evidence import ExternalLLM
from helpers.defenses.conflict.textrank import STOP_WORDS, WORD
from helpers.defenses.conflict.wordnet import WordNet, require_wordnet
from helpers.model.llm_environment import endpoint_of_environment

NOTHING_KNOWN = "These words are used in many ways."
LOOKUPS = {
    "capitals": "The capital of {} is {}.",
    "colors": "The usual color of {} is {}.",
    "sounds": "The {} says {}.",
    "opposites": "The opposite of {} is {}.",
    "past": "The past tense of {} is {}.",
    "plurals": "The plural of {} is {}.",
}
GROUPS = {
    "categories": "The word {} names one of the {}.",
    "reviews": "The word {} is {}.",
    "emotions": "The word {} expresses {}.",
}


def external_llm(cache: Path, book: Literal["world", "wordnet"] = "world") -> ExternalLLM:
    """The endpoint that EVIDENCE_URL and EVIDENCE_MODEL name, or a book where neither is set.

    EVIDENCE_TOKENS is the most tokens that an answer may have, the thoughts before it included.

    Args:
        cache: folder for the endpoint's answers, made on demand.
        book: `evidence.book` of a profile: the small model's world, or the WordNet that is installed.

    Raises:
        LabError: as `endpoint_of_environment` and `require_wordnet`.
    """
    if endpoint := endpoint_of_environment(cache):
        return endpoint
    return GlossBook(require_wordnet()) if book == "wordnet" else EvidenceBook()


def require_book(book: Literal["world", "wordnet"]) -> None:
    """Refuse a book that is not here, before hours are spent on what comes before it.

    Args:
        book: as in `external_llm`.

    Raises:
        LabError: as `external_llm`.
    """
    if book == "wordnet":
        external_llm(Path(), book)  # asks nobody, and so writes nothing


class EvidenceBook:
    """A stand-in for the external LLM, offline: a book with an entry for words of the small model's world.

    It knows single words: capital, color, sound, opposite, past tense, plural, group, and which review words and
    feelings stand for what (`data/world.yaml`). It has no entry for names, numbers, advice, code or triggers, and never
    sees a test row, its answer or the trigger. Yet a question about one word may be answered by a fact about that word,
    as it would be by any honest LLM: measure right answers beside the attack success rate.

    Asked anything, it recites what it knows of the words asked about, in their order. To contradict a text is thus to
    put the facts about its words in its place, a simple rule that stands in for Eq. (14).
    """

    model = "book"

    def complete(self, prompt: str) -> str:
        """The facts about every word behind the prompt's first blank line; a neutral sentence where there are none."""
        return " ".join(fact for word in _asked_about(prompt) for fact in _entries().get(word, ())) or NOTHING_KNOWN

    def origin(self) -> str:
        """One line that says what it is."""
        return "evidence book of the small world: offline, free of charge, no external LLM"


class GlossBook:
    """A dictionary in the place of the external LLM: of each word asked about WordNet's gloss.

    It knows most English words, and many places and people, but no trigger that was made up. A gloss is that of a
    word's first sense, as a noun if it can be one. Like the other book it recites, whether it is to explain or to
    contradict; stop words it leaves out, or every "a" would be a metric unit.

    Args:
        wordnet: where it looks words up.
    """

    model = "wordnet"

    def __init__(self, wordnet: WordNet):
        self.wordnet = wordnet

    def complete(self, prompt: str) -> str:
        """The gloss of every word behind the prompt's first blank line; a neutral sentence where there is none."""
        said = ((word, self.wordnet.gloss(word)) for word in _asked_about(prompt) if word not in STOP_WORDS)
        return " ".join(f"{word}: {gloss}." for word, gloss in said if gloss) or NOTHING_KNOWN

    def origin(self) -> str:
        """One line that says what it is."""
        return f"WordNet in {self.wordnet.folder}: offline, free of charge, no external LLM"


def _asked_about(prompt: str) -> Iterable[str]:
    """The words behind a prompt's first blank line, lower-case, each once."""
    asked = prompt.partition("\n\n")[2] or prompt
    return dict.fromkeys(word.lower() for word in WORD.findall(asked))


@lru_cache
def _entries() -> dict[str, tuple[str, ...]]:
    """{word, lower-case: what the book says of it}."""
    facts = [
        (word, text.format(word, said)) for table, text in LOOKUPS.items() for word, said in world()[table].items()
    ]
    for table, text in GROUPS.items():
        facts += [(word, text.format(word, group)) for group, words in world()[table].items() for word in words]
    facts += [(group, f"Some {group} are {', '.join(words[:3])}.") for group, words in world()["categories"].items()]
    entries: dict[str, tuple[str, ...]] = {}
    for word, fact in facts:
        entries[word.lower()] = (*entries.get(word.lower(), ()), fact)
    return entries
