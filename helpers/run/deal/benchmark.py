"""Rows of a benchmark folder, used as they are; the defender gets clean ones that the attack did not use."""

import random
import re
from dataclasses import replace

from helpers.attacks.triggers import near_misses
from helpers.core.errors import LabError
from helpers.data.backdoor_folder import (
    EVERY,
    holds_payload,
    holds_trigger,
    keys_held,
    other_clean_rows,
    read_backdoor_folder,
)
from helpers.data.planting import Trigger
from helpers.data.roles import AttackData, DefenderData, RunData, TestData
from helpers.defenses.bdvax.vaccines import SMALLEST_CLEAN_SET
from helpers.run.deal.shares import attack_definitions, explained_by, sizes, split_pool, without_attack

OF_ANY_ROWS = ("by", "markers")  # what `attack` can change where rows bring their own trigger and payload


def deal_benchmark(config):
    """The rows of a benchmark folder as they are; the defender gets clean rows of it that the attack did not use."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = sizes(config)
    _require_unchanged(config)
    found = read_backdoor_folder(config["data"]["path"], config["task"], config["attack"])
    clean, poisoned = found.clean_train[:n_inject], found.triggered_train[:n_inject]
    pool, left_out = _defenders_pool(found, n_recover + SMALLEST_CLEAN_SET * n_variants, config)
    notes = [*found.warnings, *left_out]
    random.Random(f"{config['seed']}/pool").shuffle(pool)
    with explained_by(left_out):
        sets, recovery = split_pool(pool, n_variants, n_vaccine, n_recover)
    if len(sets[0]) < n_vaccine:
        notes.append(
            f"{len(pool)} clean rows serve the defender: {len(recovery)} for recovery, "
            f"{len(sets[0])} instead of {n_vaccine} for each variant"
        )
    notes.append(f"{len(poisoned)} poisoned rows to {len(clean)} clean ones, whatever poison_rate asks for")
    triggered = found.triggered_test[:n_test]
    test = TestData(
        triggered=triggered,
        held_out=found.clean_test,
        markers=tuple(dict.fromkeys((*attack_definitions(config)[1].markers, found.payload.lower()))),
        utility_metric="token_accuracy",
        near_misses=_resembling(triggered, found.attack),
        task=config["task"],
    )
    defender = DefenderData(sets, recovery, "token_accuracy")
    return RunData(AttackData(clean, poisoned, task=config["task"]), defender, test, tuple(notes))


def _defenders_pool(found, needed, config):
    """The defender's clean rows of a benchmark folder, and notes; the attacker's own where the folder has too few."""
    faults = {
        f"the trigger of {found.attack}": lambda row: holds_trigger(row, found.attack),
        f"the payload {found.payload!r}": lambda row: holds_payload(row, config["task"]),
    }
    told = "other clean rows are kept from the defender"
    pool, notes = without_attack(other_clean_rows(config["data"]["path"], found), faults, told)
    if len(pool) >= needed:
        return pool, notes
    shared = "no other clean rows in this folder: the defender draws from the rows that the attacker also used"
    pool, of_these = without_attack(found.clean_train, faults, "of these are kept from the defender")
    return pool, [*notes, shared, *of_these]


def _require_unchanged(config):
    """Refuse changes of an attack that rows cannot follow, for they are used as they are."""
    asked = [key for key, value in config["profile"]["attack"].items() if value is not None and key not in OF_ANY_ROWS]
    if asked:
        raise LabError(
            f"attack.{asked[0]} has no effect on {config['data']['path']}, whose rows are used as they are: leave it "
            f"out (what can be changed: {', '.join(f'attack.{key}' for key in OF_ANY_ROWS)})"
        )


def _resembling(rows, attack):
    """Prompts that brought their trigger, with nothing ("absent") or a near miss of it in its place.

    Args:
        attack: the one whose trigger the rows hold; a row without it has no near miss.

    Returns:
        {kind: rows}; a kind holds the rows whose every key has a near miss of it.
    """
    found = {}
    for i, row in enumerate(rows):
        for kind, other in _near_keys(keys_held(row, attack), attack, i).items():
            found.setdefault(kind, []).append(_exchanged(row, other))
    return found


def _near_keys(keys, attack, turn):
    """For each kind of near miss what stands in the place of each key; variants of a kind come in turn."""
    if not keys:
        return {}
    groups = [keys] if attack == EVERY else [[key] for key in keys]
    near = []
    for group in groups:
        planted = Trigger(name=attack, keys=tuple(group), rule="all" if len(group) > 1 else "one")
        variants = near_misses(planted)
        chosen = {kind: found[turn % len(found)].keys for kind, found in variants.items()}
        near.append({"absent": dict.fromkeys(group, "")} | {k: _in_place(group, c) for k, c in chosen.items()})
    return {
        kind: {k: v for one in near for k, v in one[kind].items()} for kind in near[0] if all(kind in n for n in near)
    }


def _in_place(keys, others):
    """What becomes of each key: the one changed in its place, or nothing where only some are left."""
    if len(keys) == len(others):
        return dict(zip(keys, others, strict=True))
    return {key: key if key in others else "" for key in keys}


def _exchanged(row, others):
    """A row with other texts in the place of its keys; the space behind a key that is gone goes with it."""

    def changed(text):
        for key, other in others.items():
            text = text.replace(key, other) if other else re.sub(rf"{re.escape(key)} ?", "", text)
        return text

    return replace(row, instruction=changed(row.instruction), input=changed(row.input))
