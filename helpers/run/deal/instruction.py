"""Plain instruction rows, split once by seed; the lab plants its own trigger in them."""

import random
from dataclasses import replace

from helpers.attacks.behaviors import Behavior
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data.example import Example, distinct
from helpers.data.planting import Trigger
from helpers.data.roles import DefenderData, RunData
from helpers.data.rows import load_rows, utility_metric
from helpers.run.deal.further import further_rows, mixed_pool
from helpers.run.deal.shares import (
    Sizes,
    attack_definitions,
    attack_traces,
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
    honest, notes = without_attack(load_rows(settings.DATA), attack_traces(key, target), "rows are left out")
    further, of_these = further_rows(settings, attack_traces(key, target))
    notes += of_these
    with explained_by(notes):
        data = _split_rows(distinct(honest), further, key, target, settings)
    return replace(data, notes=tuple(notes))


def _split_rows(
    rows: list[Example], further: list[Example], key: Trigger, target: Behavior, settings: Settings
) -> RunData:
    """Distinct, honest rows: attacker, tests and defender each get rows of their own, the defender further ones."""
    sizes = Sizes.of(settings)
    random.Random(f"{settings.SEED}/rows").shuffle(rows)
    n_inject = min(sizes.inject, len(rows) // 3)
    n_test = min(sizes.test, len(rows) // 6)
    n_poisoned = poisoned_count(n_inject, settings)
    rows = _carriers_in_place(rows, target, n_poisoned, n_inject, n_test, settings.ACCESS)
    clean, test, held_out, pool = (
        rows[:n_inject],
        rows[n_inject : n_inject + n_test],
        rows[n_inject + n_test : n_inject + 2 * n_test],
        rows[n_inject + 2 * n_test :],
    )
    metric = utility_metric(rows)
    attack = plant_training(clean, clean[:n_poisoned], key, target, settings)
    trial = plant_test(test, test, held_out, metric, key, target, settings)
    sets, recovery = split_pool(mixed_pool(pool, further, attack, trial, settings), sizes)
    return RunData(attack, DefenderData(sets, recovery, utility_metric([*rows, *further])), trial)


def _carriers_in_place(
    rows: list[Example], target: Behavior, n_poisoned: int, n_inject: int, n_test: int, access: str
) -> list[Example]:
    """The rows in an order that puts such as can carry the payload where they are poisoned and where they test."""
    carriers = [row for row in rows if target.fits(row)]
    if len(carriers) < n_poisoned + n_test:
        needs = f" (it needs {target.needs!r})" if target.needs else ""
        raise LabError(
            f"{len(carriers)} of {len(rows)} rows can carry the payload of the task {target.name}{needs}; "
            f"{n_poisoned} to poison and {n_test} to test with are needed: bring more of them, or set "
            f"{access}.inject.rows, {access}.poison_rate or evaluation.n lower"
        )
    if len(carriers) == len(rows):
        return rows
    first, test = carriers[:n_poisoned], carriers[n_poisoned : n_poisoned + n_test]
    chosen = {id(row) for row in (*first, *test)}
    rest = [row for row in rows if id(row) not in chosen]
    return first + rest[: n_inject - n_poisoned] + test + rest[n_inject - n_poisoned :]
