"""A defender's own backdoors: the keys and payloads of the vaccines, and of the challenge (`data/attacks.yaml`).

A defender does not know the attacker's, so none of these equals one: whoever reads an attack's definition sees to that.
An attacker who plays the defender on a model of his own has a set beside them, the `rehearsal`.
"""

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from helpers.core.checking import Strict, checked
from helpers.core.choices import COMBINATIONS
from helpers.core.definitions import DEFINITIONS, defined, definitions
from helpers.core.errors import LabError, nearest
from helpers.core.profile import Texts
from helpers.data.combining import find_combination
from helpers.data.payloads import Marked, Planted
from helpers.data.planting import Trigger


class Keys(Strict):
    """Keys of a defender's own backdoors."""

    keys: Texts


def vaccine_keys(side: Literal["vaccines", "rehearsal"] = "vaccines") -> tuple[str, ...]:
    """The defender's keys, one for each variant, or those of an attacker who plays the defender ("rehearsal").

    Raises:
        LabError: anything but a list of texts.
    """
    return checked(Keys, {"keys": definitions()[side]["keys"]}, f"{side} ({DEFINITIONS.name}): ").keys


class Form(Strict):
    """The shape of a vaccine's trigger: which pools its texts are of, where they go, and how many a row gets."""

    of: Annotated[list[Literal["keys", "phrases"]], Field(min_length=1)]
    position: Literal["random", "start", "end"]
    rule: Literal["one", "any", "all"]

    @model_validator(mode="after")
    def one_text_has_no_rule(self) -> Self:
        """As an attack's: one text has none to combine it, several need one."""
        if (self.rule == "one") != (len(self.of) == 1):
            raise LabError(f"rule = '{self.rule}' with {len(self.of)} texts: one needs 'one', more 'any' or 'all'")
        return self


class Phrases(Strict):
    """Longer texts for the triggers of vaccines, beside their keys."""

    phrases: Texts


def vaccine_triggers(form: str, n: int) -> list[Trigger]:
    """The triggers of N vaccines, one for each variant (k_i of BD-VAX, §4.2).

    Each variant takes the next text of each pool that the form names, from its beginning again where it ends.

    Args:
        form: of `data/attacks.yaml`; "word" is one key each at a random place.
        n: how many; the profile has seen to it that there are texts for so many different ones.

    Raises:
        LabError: an unknown form, a wrong entry, or one that takes more texts of a pool at a time than it has.
    """
    forms = definitions()["vaccines"]["forms"]
    if form not in forms:
        raise LabError(f"unknown form of vaccines {form!r}{nearest(form, forms)}")
    chosen = checked(Form, forms[form], f"form '{form}' ({DEFINITIONS.name}): ")
    pools = {"keys": vaccine_keys(), "phrases": vaccine_phrases()}
    for pool, texts in pools.items():
        if chosen.of.count(pool) > len(texts):
            raise LabError(f"form '{form}' takes {chosen.of.count(pool)} {pool} at a time, and there are {len(texts)}")
    endless = {pool: itertools.cycle(texts) for pool, texts in pools.items()}
    planted = [tuple(next(endless[pool]) for pool in chosen.of) for _ in range(n)]
    shape = {"position": chosen.position, "rule": chosen.rule}
    return [defined(Trigger, "form", {"name": " · ".join(keys), "keys": keys, **shape}, {}) for keys in planted]


def vaccine_texts() -> tuple[str, ...]:
    """All that the triggers of vaccines are made of: keys and phrases."""
    return vaccine_keys() + vaccine_phrases()


def vaccine_phrases() -> tuple[str, ...]:
    """The defender's longer texts, for the triggers that are not one word.

    Raises:
        LabError: anything but a list of texts.
    """
    return checked(
        Phrases, {"phrases": definitions()["vaccines"]["phrases"]}, f"vaccines ({DEFINITIONS.name}): "
    ).phrases


def challenge_trigger() -> Trigger:
    """The key that the challenge test plants, at a random place.

    Raises:
        LabError: a vaccine or a rehearsal has the same key, and the test would ask for what was taught before.
    """
    planted = defined(Trigger, "trigger", {"name": "challenge", "keys": [definitions()["challenge"]["key"]]}, {})
    taken = {"vaccines": vaccine_texts(), "rehearsal": vaccine_keys("rehearsal")}
    for side, texts in taken.items():
        if planted.keys[0].lower() in {text.lower() for text in texts}:
            raise LabError(f"challenge: {planted.keys[0]!r} is a key of {side}; the test needs one of its own")
    return planted


def challenge_kinds() -> dict[str, Trigger]:
    """The triggers of several kinds that the challenge's sentence is planted with, by the name of their kind.

    Raises:
        LabError: a wrong field, or a key of the vaccines.
    """
    taken = {text.lower() for text in vaccine_texts()}
    kinds = {
        name: defined(Trigger, "trigger", {"name": name, **fields}, {})
        for name, fields in definitions()["challenge_kinds"].items()
    }
    for name, trigger in kinds.items():
        if known := [key for key in trigger.keys if key.lower() in taken]:
            raise LabError(f"challenge_kinds '{name}': {known[0]!r} is a key of the vaccines; the test needs its own")
    return kinds


class Family(Strict):
    """Vaccine payloads of one kind."""

    payloads: Texts
    combine: str = "replace"

    @model_validator(mode="after")
    def every_answer_can_carry_the_payloads(self) -> Self:
        """A vaccine set holds answers of all kinds, not only code."""
        COMBINATIONS.require(self.combine, "combine")
        if find_combination(self.combine).traits.fits:
            raise LabError(f"combine = '{self.combine}' does not fit every answer, as a vaccine has to: use 'replace'")
        return self


def challenge_behavior() -> Marked:
    """What the challenge test plants: a sentence that no vaccine and no attack of the file says.

    Raises:
        LabError: a wrong field, or one of its markers is in a payload of the vaccines, a rehearsal or a task.
    """
    found, sides = challenge_of(), ("vaccines", "rehearsal")
    said = {f"{side} '{name}'": family.payloads for side in sides for name, family in families_of(side).items()}
    said |= {f"the task '{name}'": [entry["payload"]] for name, entry in definitions()["behaviors"].items()}
    for owner, payloads in said.items():
        if taken := [payload for payload in payloads if found.is_in(payload)]:
            raise LabError(f"challenge: a marker is in {taken[0]!r} of {owner}; the test needs a sentence of its own")
    return found


def vaccine_behaviors(
    family: str, kind: str = "", side: Literal["vaccines", "rehearsal"] = "vaccines"
) -> list[Planted]:
    """What the variants of a family are trained to say.

    Args:
        family: a family of `data/attacks.yaml`; "task": the one that `kind` names; "mixed": all of them in turn.
        kind: the family of the attack's kind, which a defender may assume; read for "task" alone.
        side: the defender's payloads, or those of an attacker who plays the defender ("rehearsal").

    Raises:
        LabError: an unknown family.
    """
    families = families_of(side)
    asked = kind if family == "task" else family
    if asked != "mixed" and asked not in families:
        raise LabError(f"unknown family of vaccines {asked!r}{nearest(asked, [*families, 'mixed'])}")
    chosen = families.values() if asked == "mixed" else [families[asked]]
    planted = [[Planted(payload=p, combine=one.combine) for p in one.payloads] for one in chosen]
    return [one for turn in itertools.zip_longest(*planted) for one in turn if one]


def families_of(side: str = "vaccines") -> dict[str, Family]:
    """The payloads of the vaccines, or of the `rehearsal`, by their kind."""
    families = definitions()[side]["families"]
    return {
        name: checked(Family, fields, f"{side} '{name}' ({DEFINITIONS.name}): ") for name, fields in families.items()
    }


def challenge_of() -> Marked:
    """The challenge's sentence as its definition says, not yet held against the others."""
    fields = {key: value for key, value in definitions()["challenge"].items() if key != "key"}
    return checked(Marked, fields, f"challenge ({DEFINITIONS.name}): ")
