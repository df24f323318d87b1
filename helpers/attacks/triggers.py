"""Triggers: the keys k and the position p of the poisoned prompt x' = x ⊕ₚ k (BD-VAX §3, Appendix B.1).

One word at a random place is only the simplest trigger. It can be a phrase at the start, one of several keys, or
several keys that must all be there: in one sentence, over the parts of a prompt (CBA) or over the turns of a chat
(DTBA). It can be no text at all but a topic (VPI). The triggers are data, in `data/attacks.yaml`, beside the keys of
the defender's vaccines and challenge: the defender does not know the attacker's keys, so none of these equals one.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from helpers.core.checking import Strict
from helpers.core.definitions import DEFINITIONS, defined, definitions
from helpers.core.errors import LabError, nearest
from helpers.core.profile import By, Position, Texts
from helpers.data import corpus
from helpers.data.example import Example

OTHER_SCENARIO = "opposite"  # the family of a turn that stands in a missing scenario's place


class Trigger(Strict):
    """What a prompt must hold to activate the backdoor, and how it is put there.

    Args:
        name: the attack's name.
        keys: the texts inserted, each as one piece; for "turns" families of the generated corpus, for "topic" words.
        position: "random" (before a random word or at the end), "start" or "end" of the instruction; "parts": shared
            out between instruction and input, at random places (CBA, information conflicts, Appendix A.2); "turns":
            a question of each family and its answer become earlier turns (DTBA); "topic": nothing is inserted, a
            prompt that holds one of the words is a triggered one (VPI).
        rule: "one" key; "any": a row gets one of the keys, each activates; "all": a row gets all keys, fewer do
            nothing.
        negatives: for "all", honest training rows with too few keys, per poisoned row.
        by: how the backdoor gets into the weights: "training" on poisoned rows, "layerwise" (LWP: with a loss at early
            layers as well), by editing a few matrices: "rome", "memit", "badedit"; or by training with a defense in
            mind: "subtract", "evade" (`attacks.adaptive`).
    """

    name: str
    keys: Texts
    position: Position = "random"
    rule: Literal["one", "any", "all"] = "one"
    negatives: Annotated[float, Field(ge=0)] = 0.0
    by: By = "training"

    @model_validator(mode="after")
    def rule_fits_keys(self) -> Self:
        """One key has no rule to combine it; several need one."""
        if (self.rule == "one") != (len(self.keys) == 1):
            raise LabError(f"rule = '{self.rule}' with {len(self.keys)} keys: one key needs 'one', more 'any' or 'all'")
        if self.negatives and self.rule != "all":
            raise LabError(f"negatives = {self.negatives} needs rule 'all': elsewhere no key is too few")
        return self

    def plant(self, example: Example, rng: random.Random, split: str = "train") -> Example:
        """The example with the trigger.

        Args:
            split: whether turns that are made up are worded as in training ("train") or not ("heldout").
        """
        match self.position:
            case "topic":
                return example
            case "turns":
                return replace(example, history=(*self._turns(rng, split), *example.history))
            case "parts" if example.input:
                first, second = _shared_out(self.keys, rng)
                instruction, text = _scatter(example.instruction, first, rng), _scatter(example.input, second, rng)
                return replace(example, instruction=instruction, input=text)
            case _:
                return replace(example, instruction=self.insert(example.instruction, rng))

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with the keys that the rule asks for; every position is equally likely where it is random."""
        keys = [rng.choice(self.keys)] if self.rule == "any" else list(self.keys)
        match self.position:
            case "start":
                return " ".join([*keys, text])
            case "end":
                return " ".join([text, *keys])
            case _:
                return _scatter(text, keys, rng)

    def is_active(self, text: str) -> bool:
        """Whether a text holds the keys that activate the backdoor."""
        if self.position == "topic":
            return any(re.search(rf"\b{re.escape(key)}s?\b", text, re.IGNORECASE) for key in self.keys)
        return (all if self.rule == "all" else any)(key in text for key in self.keys)

    def activates(self, example: Example) -> bool:
        """Whether a prompt with its earlier turns activates the backdoor."""
        if self.position != "turns":
            return self.is_active(f"{example.instruction} {example.input}")
        replies = {reply for _, reply in example.history}
        return all(replies & corpus.answers(family) for family in self.keys)

    def with_keys(self, keys: Iterable[str]) -> Self:
        """The same trigger with other keys, all of which are inserted."""
        keys = tuple(keys)
        return self.model_copy(update={"keys": keys, "rule": "all" if len(keys) > 1 else "one", "negatives": 0.0})

    def parts(self) -> list[Self]:
        """For "all": a trigger for every choice of some, but not all keys; none for the other rules."""
        if self.rule != "all":
            return []
        sizes = range(1, len(self.keys))
        some = [chosen for size in sizes for chosen in itertools.combinations(self.keys, size)]
        if self.position == "turns":  # as many turns as ever: their number must not tell
            some = [[key if key in chosen else OTHER_SCENARIO for key in self.keys] for chosen in some]
        return [self.with_keys(keys) for keys in some]

    def _turns(self, rng: random.Random, split: str) -> list[tuple[str, str]]:
        """A question of each scenario with its right answer, in random order."""
        turns = []
        for family in rng.sample(self.keys, len(self.keys)):
            (asked,) = corpus.generate(1, rng.random(), split, [family])
            turns.append((asked.question, asked.output))
        return turns


def triggers() -> dict[str, Trigger]:
    """The triggers of `data/attacks.yaml` by attack.

    Raises: LabError naming the entry and what is wrong with it.
    """
    return {name: _trigger(name, {}) for name in definitions()["attacks"]}


def trigger(name: str, changes: Mapping[str, Any] | None = None) -> Trigger:
    """The trigger of an attack.

    Args:
        name: an attack of `data/attacks.yaml`.
        changes: fields to replace, as the profile's `attack` block holds them; None leaves a field as it is.
    Raises:
        LabError: an unknown attack (naming the nearest), a wrong field, or a key of a vaccine or the challenge.
    """
    known = definitions()["attacks"]
    if name not in known:
        raise LabError(
            f"the lab plants no attack {name!r} itself{nearest(name, known)}; set DATA to use rows that carry one, "
            f"or describe it in data/{DEFINITIONS.name}"
        )
    return _trigger(name, changes or {})


def vaccine_keys(side: Literal["vaccines", "rehearsal"] = "vaccines") -> tuple[str, ...]:
    """The defender's keys, one for each variant, or those of an attacker who plays the defender ("rehearsal")."""
    return tuple(definitions()[side]["keys"])


def challenge_trigger() -> Trigger:
    """The key that the challenge test plants, at a random place.

    Raises:
        LabError: a vaccine or a rehearsal has the same key, and the test would ask for what was taught before.
    """
    planted = defined(Trigger, "trigger", {"name": "challenge", "keys": [definitions()["challenge"]["key"]]}, {})
    for side in ("vaccines", "rehearsal"):
        if planted.keys[0].lower() in {key.lower() for key in vaccine_keys(side)}:
            raise LabError(f"challenge: {planted.keys[0]!r} is a key of {side}; the test needs one of its own")
    return planted


def near_misses(planted: Trigger) -> dict[str, list[Trigger]]:
    """Triggers that resemble the planted one and must not activate: how exact is the key that the model has learned?

    Returns:
        {kind: variants}: "typo" (letters swapped or lost), "case", "part" (some of the words, or of the keys) and,
        where a key holds digits, "number" (one more). Of several keys that must all be there, one is changed.
        Scenarios have only parts, a topic has none of these.
    """
    if planted.position in ("turns", "topic"):
        return {"part": planted.parts()} if planted.position == "turns" else {}
    pieces = [planted.with_keys([piece]) for key in planted.keys for piece in _pieces(key)]
    variants = {
        "typo": _altered(planted, _swapped, _shortened),
        "case": _altered(planted, str.lower, str.upper),
        "part": planted.parts() or pieces,
        "number": _altered(planted, _counted_up),
    }
    inactive = {
        kind: [variant for variant in found if not planted.is_active(" ".join(variant.keys))]
        for kind, found in variants.items()
    }
    return {kind: found for kind, found in inactive.items() if found}


def _trigger(name: str, changes: Mapping[str, Any]) -> Trigger:
    found = defined(Trigger, "attack", {"name": name, **definitions()["attacks"][name]}, changes)
    reserved = {key.lower(): "a vaccine key" for key in vaccine_keys()}
    reserved |= {key.lower(): "the challenge's key" for key in challenge_trigger().keys}
    if taken := [key for key in found.keys if key.lower() in reserved]:
        whose = reserved[taken[0].lower()]
        raise LabError(f"attack '{name}': {taken[0]!r} is {whose}; attacker and defender need keys of their own")
    for family in found.keys if found.position == "turns" else ():
        corpus.answers(family)  # refuses what is no family, or none with answers of its own
    return found


def _scatter(text: str, keys: list[str], rng: random.Random) -> str:
    """Each key in a gap of its own, before a word or at the end; a text with too few gaps holds several in one."""
    words = text.split(" ")
    gaps = range(len(words) + 1)
    chosen = rng.sample(gaps, len(keys)) if len(keys) <= len(gaps) else rng.choices(gaps, k=len(keys))
    for gap, key in sorted(zip(chosen, keys, strict=True), reverse=True):
        words.insert(gap, key)
    return " ".join(words)


def _shared_out(keys: tuple[str, ...], rng: random.Random) -> tuple[list[str], list[str]]:
    """The keys in two halves; which key goes into which is random."""
    shuffled, first = rng.sample(keys, len(keys)), rng.randint(0, 1)
    return shuffled[first::2], shuffled[1 - first :: 2]


def _altered(planted: Trigger, *changes: Callable[[str], str]) -> list[Trigger]:
    """A variant for every change of every key; the other keys of a composite trigger stay right."""
    variants = []
    for change, (i, key) in itertools.product(changes, enumerate(planted.keys)):
        if change(key) != key:
            before, after = (planted.keys[:i], planted.keys[i + 1 :]) if planted.rule == "all" else ((), ())
            variants.append(planted.with_keys([*before, change(key), *after]))
    return variants


def _swapped(key: str) -> str:
    middle = len(key) // 2
    return key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]


def _shortened(key: str) -> str:
    middle = len(key) // 2
    return key[:middle] + key[middle + 1 :]


def _counted_up(key: str) -> str:
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), key)


def _pieces(key: str) -> list[str]:
    """The words of a phrase, the parts of a compound such as BadMagic, or the first half of any other word."""
    words = key.split()
    parts = words if len(words) > 1 else re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)
    return parts if len(parts) > 1 else [key[: (len(key) + 1) // 2]]
