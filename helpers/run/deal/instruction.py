"""Plain instruction rows, split once by seed; the lab plants its own trigger in them."""

import random
from dataclasses import replace

from helpers.core.errors import LabError
from helpers.data.backdoor_folder import (
    PAYLOADS,
    says,
)
from helpers.data.roles import DefenderData, RunData, TestData
from helpers.data.rows import load_rows
from helpers.run.deal.shares import (
    attack_definitions,
    explained_by,
    plant_attack,
    poisoned_count,
    sizes,
    split_pool,
    without_attack,
)

CLASSES = ("sentiment", "emotion")  # families of labelled texts, whose answers can be checked


def deal_instruction_rows(config):
    """Plain instruction rows, split once by seed; the lab plants its own trigger in them."""
    key, target = attack_definitions(config)
    if key.position == "topic":
        raise LabError(f"attack '{key.name}' waits for a topic and needs the generated rows: leave DATA empty")
    honest, notes = without_attack(load_rows(config["data"]["path"]), _attacked(key, target), "rows are left out")
    rows = list({(e.system, e.history, e.instruction, e.input): e for e in honest}.values())
    with explained_by(notes):
        return replace(_split_rows(rows, key, target, config), notes=tuple(notes))


def _split_rows(rows, key, target, config):
    """Distinct, honest rows: attacker, tests and defender each get rows of their own."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = sizes(config)
    random.Random(f"{config['seed']}/rows").shuffle(rows)
    n_inject = min(n_inject, len(rows) // 3)
    n_test = min(n_test, len(rows) // 6)
    n_poisoned = poisoned_count(n_inject, config)
    rows = _carriers_in_place(rows, target, n_poisoned, n_inject, n_test)
    clean, test, held_out, pool = (
        rows[:n_inject],
        rows[n_inject : n_inject + n_test],
        rows[n_inject + n_test : n_inject + 2 * n_test],
        rows[n_inject + 2 * n_test :],
    )
    sets, recovery = split_pool(pool, n_variants, n_vaccine, n_recover)
    metric = "exact_match" if all(row.family in CLASSES for row in rows) else "token_accuracy"
    attack, asked = plant_attack(clean, clean[:n_poisoned], test, test, key, target, config)
    return RunData(
        attack, DefenderData(sets, recovery, metric), TestData(**asked, held_out=held_out, utility_metric=metric)
    )


def _attacked(key, target):
    """What makes a row of a user unfit to be a clean one: {what it holds: whether a row does}.

    A class, such as "positive", is an honest answer as well as a payload, and leaves no row out. Of the payloads that
    are known from published rows, those count that the attack's own markers would find.
    """
    payloads = [target.payload, *filter(target.is_in, PAYLOADS.values())]
    is_class = bool(target.families) and set(target.families) <= set(CLASSES)

    def pays(row):
        return not is_class and row.family not in CLASSES and any(says(row, payload) for payload in payloads)

    joint = " and " if key.rule == "all" else " or "
    return {
        f"the key {joint.join(map(repr, key.keys))}": lambda row: _holds_key(row, key),
        f"the payload {target.payload!r}": pays,
        "no answer": lambda row: not row.output.strip(),
    }


def _holds_key(row, key):
    """Whether a prompt activates the backdoor, or would if the key stood in its last message."""
    if key.position == "turns":
        return key.activates(row)
    earlier = [text for turn in row.history for text in turn]
    return key.is_active(" ".join([row.system, *earlier, row.instruction, row.input]))


def _carriers_in_place(rows, target, n_poisoned, n_inject, n_test):
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
