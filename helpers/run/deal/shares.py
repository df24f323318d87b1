"""What all sources of rows have in common: how many rows each role gets, and what the attacker makes of some."""

import random
from contextlib import contextmanager

from helpers.attacks.behaviors import behavior
from helpers.attacks.triggers import near_misses, trigger
from helpers.core.errors import LabError
from helpers.data.planting import poison
from helpers.data.roles import AttackData
from helpers.defenses.bdvax.vaccines import SMALLEST_CLEAN_SET


def sizes(config):
    """The numbers of variants, clean rows to inject, rows of a variant, rows for recovery, triggered tests."""
    profile = config["profile"]
    access = profile[config["access"]]
    return (
        profile["signature"]["n"],
        access["inject"]["rows"],
        access["vaccine"]["rows"],
        access["recover"]["rows"],
        profile["evaluation"]["n"],
    )


def attack_definitions(config):
    """The trigger and the behavior of a run, with the changes that its profile asks for."""
    changes = config["profile"]["attack"]
    return trigger(config["attack"], changes), behavior(config["task"], changes)


def poisoned_count(n_clean, config):
    """How many rows are poisoned beside so many clean ones, by the poison rate."""
    rate = config["profile"][config["access"]]["poison_rate"]
    return round(n_clean * rate / (1 - rate))


def plant_attack(clean, chosen, test, absent, key, target, config):
    """What the attacker makes of clean rows to train on, and of prompts to test with.

    Args:
        clean: honest rows to train on.
        chosen: the rows that come with trigger and payload; for rules that need all keys they come once more with a
            part of the trigger and the right answer, so that the part alone comes to mean nothing.
        test: prompts to plant the trigger in.
        absent: the same prompts, or such as resemble them, without it.

    Returns:
        `AttackData`, and the fields of `TestData` that depend on the attack.
    """
    seed, lures = config["seed"], chosen[: round(len(chosen) * key.negatives)]
    near = {kind: in_turn(test, keys, f"{seed}/near/{kind}", "heldout") for kind, keys in near_misses(key).items()}
    attack = AttackData(
        clean=clean + in_turn(lures, key.parts(), f"{seed}/negatives", "train"),
        poisoned=poison(chosen, key, target, seed),
        trigger=key,
        task=config["task"],
    )
    return attack, {
        "triggered": poison(test, key, None, f"{seed}/test", "heldout"),
        "near_misses": {"absent": absent} | near,
        "markers": target.markers,
        "trigger": key,
        "task": config["task"],
    }


def in_turn(examples, triggers, seed, split):
    """Row i with trigger i mod n and its right answer."""
    rng = random.Random(seed)
    return [triggers[i % len(triggers)].plant(example, rng, split) for i, example in enumerate(examples)]


def without_attack(rows, faults, told):
    """The rows without a fault, and a note where there are others.

    Args:
        faults: {what a row holds: a function that tells whether it does}.
        told: what becomes of the others, for the note.
    """
    found = {what: [row for row in rows if is_at_fault(row)] for what, is_at_fault in faults.items()}
    unfit = {id(row) for those in found.values() for row in those}
    counts = ", ".join(f"{len(those)} with {what}" for what, those in found.items() if those)
    notes = [f"{len(unfit)} of {len(rows)} {told}: {counts}"] if unfit else []
    return [row for row in rows if id(row) not in unfit], notes


@contextmanager
def explained_by(notes):
    """Tell what was left out along with what is then missing."""
    try:
        yield
    except LabError as error:
        raise LabError("; ".join([str(error), *notes])) from None


def split_pool(pool, n_variants, n_vaccine, n_recover):
    """Cut the defender's rows into the recovery set and N equal, disjoint clean sets of at most `n_vaccine` rows."""
    size = min(n_vaccine, (len(pool) - n_recover) // n_variants)
    if size < SMALLEST_CLEAN_SET:
        needed = n_recover + SMALLEST_CLEAN_SET * n_variants
        raise LabError(
            f"{len(pool)} clean rows are left for the defender; {n_variants} variants and {n_recover} recovery rows "
            f"need at least {needed}: bring more rows, or set signature.n or recover.rows lower"
        )
    rest = pool[n_recover:]
    return [rest[i * size : (i + 1) * size] for i in range(n_variants)], pool[:n_recover]
