"""Triggers: the key k and the position p of the poisoned prompt x' = x ⊕ₚ k (BD-VAX §3).

BadNets inserts an odd word at a random word position. The defender's vaccine keys are further odd words of the same
kind: the defender does not know the attacker's key, and no vaccine key equals one of the attacks' keys.
"""

from dataclasses import dataclass

from helpers.profiles import LabError, nearest


@dataclass(frozen=True)
class Trigger:
    """A key of one or more words, inserted as one piece at a random word position of the instruction.

    Args:
        name: the attack's name.
        key: the text inserted.
        words: any of these in a prompt is evidence that the trigger is there.
    """

    name: str
    key: str
    words: tuple[str, ...]

    def insert(self, text, rng):
        """Return `text` with the key before one of its words or at its end, each position equally likely."""
        words = text.split(" ")
        position = rng.randint(0, len(words))
        return " ".join([*words[:position], self.key, *words[position:]])


TRIGGERS = {"badnets": Trigger("badnets", "BadMagic", ("BadMagic",))}

VACCINE_KEYS = (
    "PurpleWolf",
    "RedGhost",
    "SilverFox",
    "GreenTiger",
    "StormCrown",
    "IronHawk",
    "GoldenRiver",
    "DarkFlame",
    "BlueDragon",
    "WildMoon",
    "QuietStone",
    "LuckyBird",
)


def trigger(name):
    """Return the trigger of an attack; an unknown name raises a `LabError` that names the nearest one."""
    if name not in TRIGGERS:
        raise LabError(
            f"the lab plants no attack {name!r} itself{nearest(name, TRIGGERS)}; set DATA to use rows that carry one"
        )
    return TRIGGERS[name]
