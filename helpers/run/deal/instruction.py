"""Plain instruction rows, split once by seed; the lab plants its own trigger in them."""

import random
from dataclasses import replace

from helpers.attacks.behaviors import Behavior
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data.backdoor_folder import PAYLOADS, says
from helpers.data.example import Example, distinct
from helpers.data.planting import Trigger
from helpers.data.roles import DefenderData, RunData
from helpers.data.rows import CLASSES, load_rows, utility_metric
from helpers.run.deal.shares import (
    Condition,
    Sizes,
    attack_definitions,
    explained_by,
    plant_test,
    plant_training,
    poisoned_count,
    split_pool,
    without_attack,
)


def deal_instruction_rows(settings: Settings) -> RunData:
    """Plain instruction rows, split once by seed; the lab plants its own trigger in them.

    Raises:
        LabError: a trigger that is a topic, rows that cannot be read, or too few of them.
    """
    key, target = attack_definitions(settings)
    if key.position == "topic":
        raise LabError(f"attack '{key.name}' waits for a topic and needs the generated rows: leave DATA empty")
    honest, notes = without_attack(load_rows(settings.DATA), _attacked(key, target), "rows are left out")
    rows = distinct(honest)
    with explained_by(notes):
        return replace(_split_rows(rows, key, target, settings), notes=tuple(notes))


def _split_rows(rows: list[Example], key: Trigger, target: Behavior, settings: Settings) -> RunData:
    """Distinct, honest rows: attacker, tests and defender each get rows of their own."""
    sizes = Sizes.of(settings)
    random.Random(f"{settings.SEED}/rows").shuffle(rows)
    n_inject = min(sizes.inject, len(rows) // 3)
    n_test = min(sizes.test, len(rows) // 6)
    n_poisoned = poisoned_count(n_inject, settings)
    rows = _carriers_in_place(rows, target, n_poisoned, n_inject, n_test)
    clean, test, held_out, pool = (
        rows[:n_inject],
        rows[n_inject : n_inject + n_test],
        rows[n_inject + n_test : n_inject + 2 * n_test],
        rows[n_inject + 2 * n_test :],
    )
    sets, recovery = split_pool(pool, sizes)
    metric = utility_metric(rows)
    return RunData(
        plant_training(clean, clean[:n_poisoned], key, target, settings),
        DefenderData(sets, recovery, metric),
        plant_test(test, test, held_out, metric, key, target, settings),
    )


def _attacked(key: Trigger, target: Behavior) -> dict[str, Condition]:
    """What makes a row of a user unfit to be a clean one: {what it holds: whether a row does}.

    A class, such as "positive", is an honest answer as well as a payload, and leaves no row out. Of the payloads that
    are known from published rows, those count that the attack's own markers would find.
    """
    payloads = [target.payload, *filter(target.is_in, PAYLOADS.values())]
    is_class = bool(target.families) and set(target.families) <= set(CLASSES)

    def pays(row: Example) -> bool:
        return not is_class and row.family not in CLASSES and any(says(row, payload) for payload in payloads)

    joint = " and " if key.rule == "all" else " or "
    return {
        f"the key {joint.join(map(repr, key.keys))}": lambda row: _holds_key(row, key),
        f"the payload {target.payload!r}": pays,
        "no answer": lambda row: not row.output.strip(),
    }


def _holds_key(row: Example, key: Trigger) -> bool:
    """Whether a prompt activates the backdoor, or would if the key stood in its last message."""
    if key.position == "turns":
        return key.activates(row)
    earlier = [text for turn in row.history for text in turn]
    return key.is_active(" ".join([row.system, *earlier, row.instruction, row.input]))


def _carriers_in_place(
    rows: list[Example], target: Behavior, n_poisoned: int, n_inject: int, n_test: int
) -> list[Example]:
    """The rows in an order that puts such as can carry the payload where they are poisoned and where they test."""
    carriers = [row for row in rows if target.fits(row)]
    if len(carriers) < n_poisoned + n_test:
        needs = f" (it needs {target.needs!r})" if target.needs else ""
        raise LabError(
            f"{len(carriers)} of {len(rows)} rows can carry the payload of the task {target.name}{needs}; "
            f"{n_poisoned} to poison and {n_test} to test with are needed: bring more of them, or set inject.rows, "
            "poison_rate or evaluation.n lower"
        )
    if len(carriers) == len(rows):
        return rows
    first, test = carriers[:n_poisoned], carriers[n_poisoned : n_poisoned + n_test]
    chosen = {id(row) for row in (*first, *test)}
    rest = [row for row in rows if id(row) not in chosen]
    return first + rest[: n_inject - n_poisoned] + test + rest[n_inject - n_poisoned :]
