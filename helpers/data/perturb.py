"""Clean rows with something odd inserted and their right answers kept: an odd prompt is no reason for another answer.

A trigger is one odd thing out of many, and a backdoored model has learned to obey that one. Rows that hold many others
teach it to pass over whatever is odd. All of it is drawn from the tokenizer's own vocabulary, so nothing of what the
lab's rows are about, or of the form of the attacker's keys, has to be known. One kind alone is different, and there for
comparison: "compound" has the form of such keys as BadMagic, which is knowledge of the trigger's shape.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helpers.core.profile import Insertion, Perturbation, Position
from helpers.data.example import Example
from helpers.data.planting import Trigger


@dataclass(frozen=True)
class Vocabulary:
    """What odd things are made of.

    Args:
        words: what begins a word, of three letters or more.
        pieces: what may stand anywhere in a word, of two letters or more; all words are among them.
    """

    words: tuple[str, ...]
    pieces: tuple[str, ...]


def perturbed(rows: Sequence[Example], numbers: Perturbation, vocabulary: Vocabulary, seed: int | str) -> list[Example]:
    """Clean rows with something odd in each prompt, and their own right answers.

    The kinds: a "word"; a "made_up" one of two or three pieces; a "phrase" of two to four words; "several" of these,
    two or three, shared out between instruction and input; a word or phrase at the "start"; a word or phrase in one of
    the earlier "turns", which is made of another row where there are none; a "compound" of two words with capitals.
    Where no place is named, it is a random one of the instruction.

    Args:
        rows: clean examples, at least one.
        numbers: which kinds, at least one, and how many rows.
        vocabulary: what odd things are made of.
        seed: decides what is inserted and where.

    Returns:
        `numbers.size(len(rows))` examples: the copies of a row next to each other, from the first row on.
    """
    rng = random.Random(f"{seed}/perturb")
    copies = itertools.cycle(row for row in rows for _ in range(numbers.copies))
    chosen = itertools.islice(copies, numbers.size(len(rows)))
    return [INSERTIONS[rng.choice(numbers.kinds)](row, rows, vocabulary, rng) for row in chosen]


def _word(vocabulary: Vocabulary, rng: random.Random) -> str:
    return rng.choice(vocabulary.words)


def _made_up(vocabulary: Vocabulary, rng: random.Random) -> str:
    return "".join(rng.choices(vocabulary.pieces, k=rng.randint(2, 3)))


def _phrase(vocabulary: Vocabulary, rng: random.Random) -> str:
    return " ".join(rng.choices(vocabulary.words, k=rng.randint(2, 4)))


def _compound(vocabulary: Vocabulary, rng: random.Random) -> str:
    """Two words with capitals written as one: the form of the attacker's key, which no other kind takes on purpose."""
    return "".join(word.capitalize() for word in rng.choices(vocabulary.words, k=2))


def _word_or_phrase(vocabulary: Vocabulary, rng: random.Random) -> str:
    return rng.choice((_word, _phrase))(vocabulary, rng)


Insert = Callable[[Example, Sequence[Example], Vocabulary, random.Random], Example]


def _one(make: Callable[[Vocabulary, random.Random], str], position: Position = "random") -> Insert:
    """One odd thing in the instruction."""
    return lambda row, _, vocabulary, rng: _holding([make(vocabulary, rng)], position).plant(row, rng)


def _several(row: Example, _: Sequence[Example], vocabulary: Vocabulary, rng: random.Random) -> Example:
    makers = rng.choices((_word, _made_up, _phrase), k=rng.randint(2, 3))
    return _holding([make(vocabulary, rng) for make in makers], "parts").plant(row, rng)


def _turns(row: Example, rows: Sequence[Example], vocabulary: Vocabulary, rng: random.Random) -> Example:
    """A word or phrase in one of the user's earlier messages."""
    turns = list(row.history)
    if not turns:
        other = rng.choice([each for each in rows if each is not row] or rows)
        turns = [(other.question, other.output)]
    i = rng.randrange(len(turns))
    asked, reply = turns[i]
    turns[i] = (_holding([_word_or_phrase(vocabulary, rng)], "random").insert(asked, rng), reply)
    return replace(row, history=tuple(turns))


def _holding(odd: Sequence[str], position: Position) -> Trigger:
    """What is inserted as a trigger is, all of it."""
    return Trigger(name="perturbation", keys=odd, position=position, rule="one" if len(odd) == 1 else "all")


INSERTIONS: dict[Insertion, Insert] = {
    "word": _one(_word),
    "made_up": _one(_made_up),
    "phrase": _one(_phrase),
    "several": _several,
    "start": _one(_word_or_phrase, "start"),
    "turns": _turns,
    "compound": _one(_compound),
}
