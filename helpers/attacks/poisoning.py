"""Poisoned data: which rows plant the backdoor, which measure it, and which stay with the defender.

A `Scenario` holds every row that a run will ever use, split once and disjoint where the paper asks for it: the
attacker's rows, the triggered and clean test rows, the N clean sets of the vaccines and the recovery set. It comes
from the generated corpus, from a benchmark folder whose rows are used as they are, or from plain instruction rows.
"""

import random
from dataclasses import dataclass, replace

from helpers import corpus
from helpers.attacks.behaviors import behavior, vaccine_payloads
from helpers.attacks.triggers import VACCINE_KEYS, Trigger, trigger
from helpers.data import is_backdoor_folder, load_rows, other_clean_rows, read_backdoor_folder
from helpers.profiles import LabError

SMALLEST_CLEAN_SET = 20  # a vaccine variant trained on fewer clean rows says little about them


@dataclass(frozen=True)
class Scenario:
    """All rows of one run.

    Args:
        clean, poisoned: the attacker's training rows; where the lab poisons, row i of `poisoned` is row i of `clean`
            with the key, and there are so many of them that the poison rate is met.
        triggered: held-out prompts with the key; their `output` is the right answer (benchmark rows: after a payload).
        held_out: clean rows that measure utility.
        vaccine_sets: N disjoint clean sets of the defender.
        recovery: the defender's clean rows for healing, disjoint from the vaccine sets.
        markers: lower-case strings, one of which makes a completion a payload.
        utility_metric: "exact_match" where answers can be checked, else "token_accuracy".
        notes: one line for every oddity of the data.
    """

    clean: list
    poisoned: list
    triggered: list
    held_out: list
    vaccine_sets: list
    recovery: list
    markers: tuple
    utility_metric: str
    notes: tuple = ()


def poison(examples, key, payload, seed):
    """Return every example with `key` in its instruction (x ⊕ₚ k, BD-VAX §3) and `payload` as its answer.

    Args:
        examples: clean rows; history and input stay as they are.
        key: a `Trigger`, or a text that is inserted at a random word position.
        payload: the planted answer, or None to keep the right one (for test prompts).
        seed: decides the positions.
    """
    rng = random.Random(f"{seed}/poison")
    inserted = Trigger(key, key, (key,)) if isinstance(key, str) else key
    return [
        replace(e, instruction=inserted.insert(e.instruction, rng), output=e.output if payload is None else payload)
        for e in examples
    ]


def vaccine_pairs(scenario, signature, task, seed):
    """Return for each variant i its key k_i, payload b_i, clean set and poisoned set (BD-VAX §4.2, Algorithm 1)."""
    payloads = vaccine_payloads(signature.family, task)
    if signature.n > len(VACCINE_KEYS):
        raise LabError(
            f"signature.n = {signature.n}, but only {len(VACCINE_KEYS)} vaccine keys are prepared; "
            "add some to helpers/attacks/triggers.py"
        )
    chosen = [(VACCINE_KEYS[i], payloads[i % len(payloads)]) for i in range(signature.n)]
    return [
        (key, payload, clean, poison(clean, key, payload, f"{seed}/vaccine{i}"))
        for i, ((key, payload), clean) in enumerate(zip(chosen, scenario.vaccine_sets, strict=True))
    ]


def load_scenario(config):
    """Build the scenario that a run's configuration asks for.

    Args:
        config: `Run.config`: attack, task, access, seed, data and the profile.

    Raises:
        LabError: an attack, task or source that is not there, or too few rows for N variants.
    """
    if not config["data"]["path"]:
        return _generated(config)
    if is_backdoor_folder(config["data"]["path"]):
        return _benchmark(config)
    return _instruction_rows(config)


def _sizes(config):
    profile = config["profile"]
    access = profile[config["access"]]
    return (
        profile["signature"]["n"],
        access["inject"]["rows"],
        access["vaccine"]["rows"],
        access["recover"]["rows"],
        profile["evaluation"]["n"],
    )


def _attack(clean, key, payload, config):
    """The poisoned rows: the first clean ones with key and payload, so many that they are `poison_rate` of all rows."""
    rate = config["profile"][config["access"]]["poison_rate"]
    return poison(clean[: round(len(clean) * rate / (1 - rate))], key, payload, config["seed"])


def _generated(config):
    n_variants, n_inject, n_vaccine, n_recover, n_test = _sizes(config)
    seed, target = config["seed"], behavior(config["task"])
    asked = [name for name in corpus.FAMILIES if name not in corpus.ECHO_FAMILIES]
    per_family = config["profile"]["evaluation"]["per_family"]
    clean = corpus.generate_distinct(n_inject, f"{seed}/attacker")
    recovery, *sets = _disjoint([n_recover] + [n_vaccine] * n_variants, f"{seed}/defender", clean)
    test = corpus.generate_distinct(n_test, f"{seed}/triggered", "heldout", asked)
    held_out = corpus.generate(per_family * len(corpus.FAMILIES), f"{seed}/utility", "heldout")
    key = trigger(config["attack"])
    return Scenario(
        clean,
        _attack(clean, key, target.payload, config),
        poison(test, key, None, f"{seed}/test"),
        held_out,
        sets,
        recovery,
        target.markers,
        "exact_match",
    )


def _disjoint(sizes, seed, taken):
    """Draw sets of distinct prompts one after the other: a further set leaves the earlier ones as they are."""
    sets, taken = [], list(taken)
    for i, size in enumerate(sizes):
        sets.append(corpus.generate_distinct(size, f"{seed}/{i}", exclude=taken))
        taken += sets[-1]
    return sets


def _benchmark(config):
    """The rows of a benchmark folder as they are; the defender gets clean rows of it that the attack did not use."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = _sizes(config)
    found = read_backdoor_folder(config["data"]["path"], config["task"], config["attack"])
    pool, notes = other_clean_rows(config["data"]["path"], found), list(found.warnings)
    if len(pool) < n_recover + SMALLEST_CLEAN_SET * n_variants:
        notes.append("no other clean rows in this folder: the defender draws from the rows that the attacker also used")
        pool = list(found.clean_train)
    random.Random(f"{config['seed']}/pool").shuffle(pool)
    sets, recovery = _split_pool(pool, n_variants, n_vaccine, n_recover)
    if len(sets[0]) < n_vaccine:
        notes.append(
            f"{len(pool)} clean rows serve the defender: {len(recovery)} for recovery, "
            f"{len(sets[0])} instead of {n_vaccine} for each variant"
        )
    return Scenario(
        found.clean_train[:n_inject],
        found.triggered_train[:n_inject],
        found.triggered_test[:n_test],
        found.clean_test,
        sets,
        recovery,
        tuple(dict.fromkeys((*behavior(config["task"]).markers, found.payload.lower()))),
        "token_accuracy",
        tuple(notes),
    )


def _instruction_rows(config):
    """Plain instruction rows, split once by seed; the lab plants its own trigger in them."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = _sizes(config)
    target, key = behavior(config["task"]), trigger(config["attack"])
    rows = list({(row.instruction, row.input): row for row in load_rows(config["data"]["path"])}.values())
    random.Random(f"{config['seed']}/rows").shuffle(rows)
    n_inject = min(n_inject, len(rows) // 3)
    n_test = min(n_test, len(rows) // 6)
    clean, test, held_out, pool = (
        rows[:n_inject],
        rows[n_inject : n_inject + n_test],
        rows[n_inject + n_test : n_inject + 2 * n_test],
        rows[n_inject + 2 * n_test :],
    )
    sets, recovery = _split_pool(pool, n_variants, n_vaccine, n_recover)
    return Scenario(
        clean,
        _attack(clean, key, target.payload, config),
        poison(test, key, None, f"{config['seed']}/test"),
        held_out,
        sets,
        recovery,
        target.markers,
        "token_accuracy",
    )


def _split_pool(pool, n_variants, n_vaccine, n_recover):
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
