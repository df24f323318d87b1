"""Rows of a benchmark folder, used as they are; the defender gets clean ones that the attack did not use."""

import re
from collections.abc import Mapping
from dataclasses import replace

from helpers.attacks.triggers import near_misses
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data.backdoor_folder import (
    EVERY,
    PoisonSet,
    holds_payload,
    holds_trigger,
    keys_held,
    other_clean_rows,
    read_backdoor_folder,
)
from helpers.data.example import Example
from helpers.data.planting import Trigger
from helpers.data.roles import AttackData, DefenderData, RunData, TestData
from helpers.run.deal.further import further_rows, require_unseen
from helpers.run.deal.shares import (
    Condition,
    Sizes,
    attack_definitions,
    explained_by,
    shuffled_pool,
    split_pool,
    without_attack,
)

METRIC = "token_accuracy"
OF_ANY_ROWS = ("by", "markers")  # what `attack` can change where rows bring their own trigger and payload


def deal_benchmark(settings: Settings) -> RunData:
    """The rows of a benchmark folder as they are; the defender gets clean rows of it that the attack did not use.

    Raises:
        LabError: a folder without this attack on this task, changes that given rows cannot follow, or too few rows.
    """
    sizes = Sizes.of(settings)
    _require_unchanged(settings)
    found = read_backdoor_folder(settings.DATA, settings.TASK, settings.ATTACK)
    clean, poisoned = found.clean_train[: sizes.inject], found.triggered_train[: sizes.inject]
    faults = _faults(found, settings.TASK)
    further, of_these = further_rows(settings, faults)
    pool, left_out = _defenders_pool(found, faults, sizes.least_for_defender - len(further), settings)
    left_out += of_these
    notes = [*found.warnings, *left_out]
    pool = shuffled_pool(pool, further, settings)
    with explained_by(left_out):
        sets, recovery = split_pool(pool, sizes)
    if len(sets[0]) < sizes.vaccine:
        notes.append(
            f"{len(pool)} clean rows serve the defender: {len(recovery)} for recovery, "
            f"{len(sets[0])} instead of {sizes.vaccine} for each variant"
        )
    notes.append(f"{len(poisoned)} poisoned rows to {len(clean)} clean ones, whatever poison_rate asks for")
    attack, trial = AttackData(clean, poisoned, task=settings.TASK), _test_data(found, sizes.test, settings)
    require_unseen(further, attack, trial, settings.ROWS)
    return RunData(attack, DefenderData(sets, recovery, METRIC), trial, tuple(notes))


def _test_data(found: PoisonSet, n: int, settings: Settings) -> TestData:
    """At most `n` triggered prompts of the folder and all of its clean questions."""
    triggered = found.triggered_test[:n]
    return TestData(
        triggered=triggered,
        held_out=found.clean_test,
        markers=tuple(dict.fromkeys((*attack_definitions(settings)[1].markers, found.payload.lower()))),
        utility_metric=METRIC,
        near_misses=_resembling(triggered, found.attack),
        task=settings.TASK,
    )


def _faults(found: PoisonSet, task: str) -> dict[str, Condition]:
    """What makes a row unfit to be a clean one of the defender."""
    return {
        f"the trigger of {found.attack}": lambda row: holds_trigger(row, found.attack),
        f"the payload {found.payload!r}": lambda row: holds_payload(row, task),
    }


def _defenders_pool(
    found: PoisonSet, faults: Mapping[str, Condition], needed: int, settings: Settings
) -> tuple[list[Example], list[str]]:
    """The defender's clean rows of a benchmark folder, and notes; the attacker's own where the folder has too few."""
    told = "other clean rows are kept from the defender"
    pool, notes = without_attack(other_clean_rows(settings.DATA, found), faults, told)
    if len(pool) >= needed:
        return pool, notes
    shared = "no other clean rows in this folder: the defender draws from the rows that the attacker also used"
    pool, of_these = without_attack(found.clean_train, faults, "of these are kept from the defender")
    return pool, [*notes, shared, *of_these]


def _require_unchanged(settings: Settings) -> None:
    """Refuse changes of an attack that rows cannot follow, for they are used as they are."""
    asked = [key for key, value in settings.profile.attack if value is not None and key not in OF_ANY_ROWS]
    if asked:
        raise LabError(
            f"attack.{asked[0]} has no effect on {settings.DATA}, whose rows are used as they are: leave it "
            f"out (what can be changed: {', '.join(f'attack.{key}' for key in OF_ANY_ROWS)})"
        )


def _resembling(rows: list[Example], attack: str) -> dict[str, list[Example]]:
    """Prompts that brought their trigger, with nothing ("absent") or a near miss of it in its place.

    Args:
        rows: triggered prompts.
        attack: the one whose trigger the rows hold; a row without it has no near miss.

    Returns:
        {kind: rows}; a kind holds the rows whose every key has a near miss of it.
    """
    found = {}
    for i, row in enumerate(rows):
        for kind, other in _near_keys(keys_held(row, attack), attack, i).items():
            found.setdefault(kind, []).append(_exchanged(row, other))
    return found


def _near_keys(keys: list[str], attack: str, turn: int) -> dict[str, dict[str, str]]:
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


def _in_place(keys: list[str], others: tuple[str, ...]) -> dict[str, str]:
    """What becomes of each key: the one changed in its place, or nothing where only some are left."""
    if len(keys) == len(others):
        return dict(zip(keys, others, strict=True))
    return {key: key if key in others else "" for key in keys}


def _exchanged(row: Example, others: Mapping[str, str]) -> Example:
    """A row with other texts in the place of its keys; the space behind a key that is gone goes with it."""

    def changed(text: str) -> str:
        for key, other in others.items():
            text = text.replace(key, other) if other else re.sub(rf"{re.escape(key)} ?", "", text)
        return text

    return replace(row, instruction=changed(row.instruction), input=changed(row.input))
