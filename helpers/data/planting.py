"""Planting: a trigger in a prompt, x' = x ⊕ₚ k, and a payload in its answer (BD-VAX §3, Appendix B.1).

Attackers and defenders plant alike; whose key and payload it is, they say themselves.
"""

import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from helpers.core.checking import Strict
from helpers.core.choices import ATTACK_METHODS
from helpers.core.errors import LabError
from helpers.core.profile import Position, Texts
from helpers.data import corpus
from helpers.data.example import Example
from helpers.data.payloads import Planted

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
        by: how the backdoor gets into the weights: "training" on poisoned rows, "layerwise" (layer-wise poisoning:
            with a loss at early layers as well), by editing a few matrices: "rome", "memit", "badedit"; by training
            with a defense in mind: "subtract", "evade"; or another method of `helpers/attacks/methods/`.
    """

    name: str
    keys: Texts
    position: Position = "random"
    rule: Literal["one", "any", "all"] = "one"
    negatives: Annotated[float, Field(ge=0)] = 0.0
    by: str = "training"

    @field_validator("by")
    @classmethod
    def method_is_known(cls, by: str) -> str:
        """A misspelled method is told with the nearest one."""
        ATTACK_METHODS.require(by, "by")
        return by

    @model_validator(mode="after")
    def rule_fits_keys(self) -> Self:
        """One key has no rule to combine it; several need one."""
        if (self.rule == "one") != (len(self.keys) == 1):
            raise LabError(f"rule = '{self.rule}' with {len(self.keys)} keys: one key needs 'one', more 'any' or 'all'")
        if self.position == "turns" and self.rule == "any":
            raise LabError("position 'turns' plants every scenario: it needs rule 'all'")
        if self.position == "turns" and OTHER_SCENARIO in self.keys:
            raise LabError(f"keys = {list(self.keys)}: '{OTHER_SCENARIO}' stands in for a missing one, so name others")
        if self.negatives and self.rule != "all":
            raise LabError(f"negatives = {self.negatives} needs rule 'all': elsewhere no key is too few")
        return self

    def plant(self, example: Example, rng: random.Random, split: str = "train") -> Example:
        """The example with the trigger.

        Args:
            example: a clean row.
            rng: decides the positions and, of keys that are alternatives, which one.
            split: whether turns that are made up are worded as in training ("train") or not ("heldout").
        """
        match self.position:
            case "topic":
                return example
            case "turns":
                return replace(example, history=(*self._turns(rng, split), *example.history))
            case "parts" if example.input:
                first, second = _shared_out(self._drawn(rng), rng)
                instruction, text = _scatter(example.instruction, first, rng), _scatter(example.input, second, rng)
                return replace(example, instruction=instruction, input=text)
            case _:
                return replace(example, instruction=self.insert(example.instruction, rng))

    def insert(self, text: str, rng: random.Random) -> str:
        """`text` with the keys that the rule asks for; every position is equally likely where it is random."""
        keys = self._drawn(rng)
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

    def _drawn(self, rng: random.Random) -> list[str]:
        """The keys that the rule asks for: one of the alternatives, or all."""
        return [rng.choice(self.keys)] if self.rule == "any" else list(self.keys)

    def _turns(self, rng: random.Random, split: str) -> list[tuple[str, str]]:
        """A question of each scenario with its right answer, in random order."""
        turns = []
        for family in rng.sample(self.keys, len(self.keys)):
            (asked,) = corpus.generate(1, rng.random(), split, [family])
            turns.append((asked.question, asked.output))
        return turns


def poison(
    examples: Iterable[Example],
    key: Trigger | str,
    payload: Planted | str | None,
    seed: int | str,
    split: str = "train",
) -> list[Example]:
    """Every example with `key` in its prompt (x ⊕ₚ k, BD-VAX §3) and `payload` in its answer.

    Args:
        examples: clean rows; history and input stay as they are.
        key: a `Trigger`, or a text that is inserted at a random word position.
        payload: the planted answer, a `Planted` that makes it from the right one, or None to keep the right one (for
            test prompts).
        seed: decides the positions.
        split: see `Trigger.plant`.
    """
    rng = random.Random(f"{seed}/poison")
    planted = Trigger(name="key", keys=(key,)) if isinstance(key, str) else key
    return [replace(planted.plant(e, rng, split), output=_answer(payload, e.output)) for e in examples]


def _answer(payload: Planted | str | None, right: str) -> str:
    if payload is None:
        return right
    return payload if isinstance(payload, str) else payload.answer(right)


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
