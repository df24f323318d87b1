"""Glosses from an installed WordNet: what a word means in its most frequent sense, without a network or an LLM.

The database is a pair of plain files for each part of speech (WordNet's manual, wndb(5WN)): `index.noun` gives the
places of a word's senses, the most frequent first, and `data.noun` holds at such a place, counted in bytes, the sense
with its gloss behind a bar. Debian's `wordnet-base` and NLTK's corpus `wordnet` bring the same files.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from helpers.core.errors import MissingError
from helpers.data.example import Example
from helpers.defenses.conflict.evidence import add_evidence
from helpers.defenses.conflict.textrank import WORD, keywords

HEADING = "### Evidence:"
PARTS = ("noun", "verb", "adj", "adv")
NLTK = ("~/nltk_data", "/usr/share/nltk_data", "/usr/local/share/nltk_data")
PLACES = ("/usr/share/wordnet", *(f"{folder}/corpora/wordnet" for folder in NLTK))
ENDINGS = {  # what a lemma has in the place of an inflected word's ending (morphy(7WN), rules of detachment)
    "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"))
    + (("ies", "y"),),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


class WordNet:
    """A WordNet database.

    Args:
        folder: holds `index.noun`, `data.noun` and so on; a part of speech that is not there is left out.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def gloss(self, word: str) -> str:
        """What a word means: the definition of its first sense, without examples; "" where no file knows it.

        Nouns come first, then verbs, adjectives and adverbs. An inflected word is looked up as it stands, then by its
        irregular lemma, then by its regular ones.
        """
        for part, senses in self._senses.items():
            for lemma in self._lemmas(word.lower(), part):
                if lemma in senses:
                    return self._definition(part, senses[lemma])
        return ""

    @cached_property
    def _senses(self) -> dict[str, dict[str, int]]:
        """{part of speech: {lemma: place of its first sense}}."""
        files = {part: self.folder / f"index.{part}" for part in PARTS}
        return {part: dict(_first_senses(file)) for part, file in files.items() if file.is_file()}

    @cached_property
    def _irregular(self) -> dict[str, dict[str, str]]:
        """{part of speech: {inflected word: its lemma}}, from `noun.exc` and so on."""
        files = {part: self.folder / f"{part}.exc" for part in PARTS}
        return {part: dict(_exceptions(file)) for part, file in files.items() if file.is_file()}

    def _lemmas(self, word: str, part: str) -> Iterator[str]:
        yield word
        yield self._irregular.get(part, {}).get(word, word)
        for ending, lemma in ENDINGS[part]:
            if word.endswith(ending):
                yield word.removesuffix(ending) + lemma

    def _definition(self, part: str, place: int) -> str:
        with (self.folder / f"data.{part}").open("rb") as file:
            file.seek(place)
            gloss = file.readline().decode().partition("|")[2]
        return gloss.partition('; "')[0].strip()


def _first_senses(index: Path) -> Iterator[tuple[str, int]]:
    """Lemma and place of its first sense, for each line; those of the licence begin with a space."""
    with index.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(" "):
                lemma, _, senses, *rest = line.split()
                yield lemma, int(rest[-int(senses)])


def _exceptions(file: Path) -> Iterator[tuple[str, str]]:
    """Inflected word and the first of its lemmas, for each line."""
    for line in file.read_text(encoding="utf-8").splitlines():
        word, lemma, *_ = line.split()
        yield word, lemma


def require_wordnet() -> WordNet:
    """The WordNet of this machine: in the folder that WNSEARCHDIR names, of Debian or of NLTK.

    Raises:
        MissingError: there is none.
    """
    folders = [Path(place).expanduser() for place in filter(None, (os.environ.get("WNSEARCHDIR"), *PLACES))]
    if found := next((folder for folder in folders if (folder / "index.noun").is_file()), None):
        return WordNet(found)
    raise MissingError("prompts are to carry WordNet's glosses, and none is installed here: install wordnet-base")


def with_glosses(example: Example, wordnet: WordNet, words: int = 5, max_words: int = 100) -> Example:
    """The example with the glosses of its heaviest words as evidence; as it is where WordNet knows none of its words.

    Args:
        words: how many of TextRank's words are looked up. LETHE: 5.
        max_words: longer evidence is cut, its heading not counted; see `add_evidence`.

    Differs from LETHE:
        its graph of words has no direction, the lab's has that of reading; a word that WordNet does not know is left
        out, where LETHE says so in the prompt; all of the evidence stands on one line.
    """
    if not WORD.search(example.question):
        return example
    heaviest = [word.lower() for word in keywords(example.question, eta=0.0)[:words]]
    known = {word: gloss for word in heaviest if (gloss := wordnet.gloss(word))}
    if not known:
        return example
    said = "; ".join(f"{word}: {gloss}" for word, gloss in known.items())
    return add_evidence(example, f"{HEADING} {said}", max_words + len(HEADING.split()))
