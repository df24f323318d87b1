"""Dealing the clean rows of somebody who knows no trigger: vaccines, recovery, and rows that only measure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from helpers.core.errors import LabError
from helpers.core.paths import existing, find_existing
from helpers.core.profile import Budget, Profile
from helpers.data import corpus
from helpers.data.example import Example, distinct
from helpers.data.roles import SMALLEST_CLEAN_SET, DefenderData, Trial
from helpers.data.rows import load_rows, utility_metric

MEASURING = 5  # one row in so many is held out, at most as many as the profile's `evaluation.n`
MOST_ANSWERS = 20  # different unwanted answers that are taken for markers as they are


@dataclass(frozen=True)
class UserRows:
    """The clean rows of a user, split once.

    Args:
        defender: for vaccines and recovery.
        held_out: clean rows that nothing is trained on.
        notes: one line for every oddity.
    """

    defender: DefenderData
    held_out: list[Example]
    notes: tuple[str, ...]


def deal_rows(path: str, profile: Profile, access: str, seed: int) -> UserRows:
    """Split clean rows into disjoint sets: held out, recovery, and one for each of the N variants.

    Args:
        path: a file of rows, see `load_rows`; empty: rows of the generated corpus.
        profile: the sizes that are wanted.
        access: "adapter" or "full".
        seed: of the split.

    Raises:
        LabError: rows that cannot be read, or too few of them.
    """
    numbers, n = profile.access(access), profile.signature.n
    if not path:
        needed = profile.evaluation.n + numbers.recover.rows + n * numbers.vaccine.rows
        rows, metric = corpus.generate_distinct(needed, f"{seed}/purify"), "exact_match"
        notes = [
            "no ROWS were given: the lab's generated ones take their place, which say little about another model's "
            "abilities"
        ]
    else:
        if not find_existing(path):
            raise LabError(
                f"ROWS = '{path}' does not exist; expected a .json, .jsonl, .parquet or .tsv file of clean rows"
            )
        answered = [row for row in load_rows(existing(path)) if row.output.strip()]
        rows = distinct(answered)
        metric = utility_metric(rows)
        notes = []
    random.Random(f"{seed}/purify/rows").shuffle(rows)
    held_out, recovery, sets = _split(rows, profile, access)
    if path:
        notes.append(
            f"{len(rows)} clean rows: {len(held_out)} measure, {len(recovery)} recover (wanted: "
            f"{numbers.recover.rows}), {n} x {len(sets[0])} make vaccines (wanted: {numbers.vaccine.rows} each)"
        )
        if len(sets[0]) < numbers.vaccine.rows:
            notes.append("fewer rows than wanted are gone through more often, so that as many steps are made")
    return UserRows(DefenderData(sets, recovery, metric), held_out, tuple(notes))


def more_epochs(profile: Profile, access: str, defender: DefenderData) -> Profile:
    """The profile with as many epochs as it takes to make its steps with the rows that there are.

    Args:
        profile: whose budgets ask for rows and epochs.
        access: "adapter" or "full".
        defender: the rows that there are.
    """
    vaccines = [len(rows) for rows in defender.vaccine_sets]
    planting = sum(vaccines) - min(profile.challenge.n, sum(vaccines) // 2)
    numbers, challenge = profile.access(access), profile.challenge
    changed = {
        "recover": _stretched(numbers.recover, len(defender.recovery)),
        "vaccine": _stretched(numbers.vaccine, min(vaccines)),
    }
    return profile.model_copy(
        update={
            access: numbers.model_copy(update=changed),
            "challenge": challenge.model_copy(update={"plant": _stretched(challenge.plant, planting)}),
        }
    )


def _stretched(budget: Budget, rows: int) -> Budget:
    return budget.model_copy(update={"epochs": math.ceil(budget.epochs * max(1, budget.rows / rows))})


def _split(
    rows: list[Example], profile: Profile, access: str
) -> tuple[list[Example], list[Example], list[list[Example]]]:
    """Held-out, recovery and vaccine rows; where there are few, each gets its part of what was wanted.

    Raises:
        LabError: fewer rows than `SMALLEST_CLEAN_SET` for recovery and for each variant, there or wanted.
    """
    numbers, most, n = profile.access(access), profile.evaluation.n, profile.signature.n
    recover, vaccine = numbers.recover.rows, numbers.vaccine.rows
    for name, wanted in {"recover.rows": recover, "vaccine.rows": vaccine}.items():
        if wanted < SMALLEST_CLEAN_SET:
            raise LabError(f"{access}.{name} = {wanted}: {SMALLEST_CLEAN_SET} clean rows or more are needed")
    held = min(most, len(rows) // MEASURING)
    left = len(rows) - held
    share = min(1.0, left / (recover + n * vaccine))
    sizes = {"recovery": int(share * recover), "variant": int(share * vaccine)}
    if min(sizes.values()) < SMALLEST_CLEAN_SET:
        least = next(
            count
            for count in range(len(rows) + 1, 100 * (recover + n * vaccine))
            if min(recover, vaccine) * (count - min(most, count // MEASURING))
            >= SMALLEST_CLEAN_SET * (recover + n * vaccine)
        )
        raise LabError(
            f"{len(rows)} clean rows are too few: {n} variants and the recovery need {SMALLEST_CLEAN_SET} each, which "
            f"takes {least} in all; bring more ROWS, or set signature.n lower in SET"
        )
    recovery, rest = rows[held : held + sizes["recovery"]], rows[held + sizes["recovery"] :]
    sets = [rest[i * sizes["variant"] : (i + 1) * sizes["variant"]] for i in range(n)]
    return rows[:held], recovery, sets


def read_triggered(path: str, markers: str, held_out: list[Example], metric: str) -> Trial:
    """The trial of a trigger that the user happens to have: prompts that hold it, and what must not be answered.

    Args:
        path: a file of rows whose `output` is the unwanted answer.
        markers: a file with one text a line; a completion that holds one of them, in any case, is unwanted. Empty: the
            outputs of the rows are the markers.
        held_out: clean rows that measure utility.
        metric: of the utility, see `Trial`.

    Raises:
        LabError: files that cannot be read, or too many different answers to be markers.
    """
    if not find_existing(path):
        raise LabError(
            f"TRIGGERED = '{path}' does not exist; expected a file of rows whose output is the unwanted answer"
        )
    rows = load_rows(existing(path))
    if markers:
        if not find_existing(markers):
            raise LabError(f"MARKERS = '{markers}' does not exist; expected a file with one text a line")
        lines = _text_of(existing(markers)).splitlines()
        found = list(dict.fromkeys(line.strip().lower() for line in lines if line.strip()))
        if not found:
            raise LabError(f"MARKERS = '{markers}' holds no text; expected one a line")
    else:
        found = list(dict.fromkeys(row.output.strip().lower() for row in rows if row.output.strip()))
        if len(found) > MOST_ANSWERS:
            raise LabError(
                f"TRIGGERED = '{path}' holds {len(found)} different answers: say in MARKERS, a file with one text a "
                "line, what an unwanted answer holds"
            )
    return Trial(triggered=rows, held_out=held_out, markers=tuple(found), utility_metric=metric)


def _text_of(markers: str | Path) -> str:
    """The text of a file, without the mark that some editors put in front of it."""
    try:
        return Path(markers).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise LabError(
            f"MARKERS = '{markers}' is no UTF-8 text file; expected one with one text a line: save it as UTF-8"
        ) from None
