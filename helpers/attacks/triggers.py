"""Triggers: the keys k and the position p of the poisoned prompt x' = x ⊕ₚ k (BD-VAX §3, Appendix B.1).

One word at a random place is only the simplest trigger. It can be a phrase at the start, one of several keys, or
several keys that must all be there: in one sentence, over the parts of a prompt (CBA) or over the turns of a chat
(DTBA). It can be no text at all but a topic (VPI). The triggers are data, in `data/attacks.yaml`, beside the keys of
the defender's vaccines and challenge: the defender does not know the attacker's keys, so none of these equals one.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from helpers.core.definitions import DEFINITIONS, defined, definitions
from helpers.core.errors import LabError, nearest
from helpers.data import corpus
from helpers.data.own_backdoors import (
    challenge_kinds,
    challenge_trigger,
    vaccine_texts,
)
from helpers.data.planting import Trigger


def triggers() -> dict[str, Trigger]:
    """The triggers of `data/attacks.yaml` by attack.

    Raises:
        LabError: a wrong entry; it names the entry and what is wrong with it.
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
    reserved = {text.lower(): "a vaccine key" for text in vaccine_texts()}
    reserved |= {key.lower(): "a key of challenge_kinds" for kind in challenge_kinds().values() for key in kind.keys}
    reserved |= {key.lower(): "the challenge's key" for key in challenge_trigger().keys}
    if taken := [key for key in found.keys if key.lower() in reserved]:
        whose = reserved[taken[0].lower()]
        raise LabError(f"attack '{name}': {taken[0]!r} is {whose}; attacker and defender need keys of their own")
    for family in found.keys if found.position == "turns" else ():
        corpus.answers(family)  # refuses what is no family, or none with answers of its own
    return found


def _altered(planted: Trigger, *changes: Callable[[str], str]) -> list[Trigger]:
    """A variant for every change of every key; the other keys of a composite trigger stay right."""
    variants = []
    for change, (i, key) in itertools.product(changes, enumerate(planted.keys)):
        if change(key) not in ("", key):
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
