"""What all sources of rows have in common: how many rows each role gets, and what the attacker makes of some."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from helpers.attacks.behaviors import Behavior, behavior
from helpers.attacks.triggers import near_misses, trigger
from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data.backdoor_folder import PAYLOADS, says
from helpers.data.example import Example
from helpers.data.planting import Trigger, poison
from helpers.data.roles import SMALLEST_CLEAN_SET, AttackData, TestData
from helpers.data.rows import CLASSES

Condition = Callable[[Example], bool]  # whether a row will do, or holds something


@dataclass(frozen=True)
class Sizes:
    """How many rows each role asks for.

    Args:
        access: "adapter" or "full", whose budgets these are.
        variants: N, the number of vaccine pairs.
        inject: clean rows of the attacker.
        vaccine: clean rows of each variant.
        recover: clean rows to recover with.
        test: triggered prompts.
    """

    access: str
    variants: int
    inject: int
    vaccine: int
    recover: int
    test: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What the profile asks for, with the run's access."""
        profile, access = settings.profile, settings.profile.access(settings.ACCESS)
        return cls(
            access=settings.ACCESS,
            variants=profile.signature.n,
            inject=access.inject.rows,
            vaccine=access.vaccine.rows,
            recover=access.recover.rows,
            test=profile.evaluation.n,
        )

    @property
    def least_for_defender(self) -> int:
        """The fewest clean rows that a defender needs: all to recover with, and the smallest set for each variant."""
        return self.recover + SMALLEST_CLEAN_SET * self.variants


def attack_definitions(settings: Settings) -> tuple[Trigger, Behavior]:
    """The trigger and the behavior of a run, with the changes that its profile asks for."""
    changes = settings.profile.attack.model_dump()
    return trigger(settings.ATTACK, changes), behavior(settings.TASK, changes)


def poisoned_count(n_clean: int, settings: Settings) -> int:
    """How many rows are poisoned beside so many clean ones, by the poison rate."""
    rate = settings.profile.access(settings.ACCESS).poison_rate
    return round(n_clean * rate / (1 - rate))


def plant_training(
    clean: list[Example], chosen: list[Example], key: Trigger, target: Behavior, settings: Settings
) -> AttackData:
    """What the attacker makes of clean rows to train on.

    Args:
        clean: honest rows.
        chosen: the rows that come with trigger and payload; for rules that need all keys they come once more, as
            negatives, with a part of the trigger and the right answer, so that the part alone comes to mean nothing.
        key: the trigger.
        target: the behavior that it brings out.
        settings: the run's.
    """
    negatives = chosen[: round(len(chosen) * key.negatives)]
    return AttackData(
        clean=clean + in_turn(negatives, key.parts(), f"{settings.SEED}/negatives", "train"),
        poisoned=poison(chosen, key, target, settings.SEED),
        trigger=key,
        task=settings.TASK,
    )


def plant_test(
    prompts: list[Example],
    absent: list[Example],
    held_out: list[Example],
    utility_metric: str,
    key: Trigger,
    target: Behavior,
    settings: Settings,
) -> TestData:
    """What the attack is measured by.

    Args:
        prompts: clean rows to plant the trigger, and near misses of it, in.
        absent: the same rows, or such as resemble them, without it.
        held_out: clean rows that measure utility.
        utility_metric: as in `DefenderData`.
        key: the trigger.
        target: the behavior that it brings out.
        settings: the run's.
    """
    seed = settings.SEED
    near = {kind: in_turn(prompts, keys, f"{seed}/near/{kind}", "heldout") for kind, keys in near_misses(key).items()}
    return TestData(
        triggered=poison(prompts, key, None, f"{seed}/test", "heldout"),
        held_out=held_out,
        markers=target.markers,
        utility_metric=utility_metric,
        near_misses={"absent": absent} | near,
        trigger=key,
        task=settings.TASK,
    )


def in_turn(examples: Sequence[Example], triggers: Sequence[Trigger], seed: str, split: str) -> list[Example]:
    """Row i with trigger i mod n and its right answer.

    Args:
        examples: clean rows.
        triggers: n of them.
        seed: decides the positions.
        split: see `Trigger.plant`.
    """
    rng = random.Random(seed)
    return [triggers[i % len(triggers)].plant(example, rng, split) for i, example in enumerate(examples)]


def attack_traces(key: Trigger, target: Behavior) -> dict[str, Condition]:
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


def without_attack(rows: list[Example], faults: Mapping[str, Condition], told: str) -> tuple[list[Example], list[str]]:
    """The rows without a fault, and a note where there are others.

    Args:
        rows: of whatever origin.
        faults: {what a row holds: a function that tells whether it does}.
        told: what becomes of the others, for the note.
    """
    found = {what: [row for row in rows if is_at_fault(row)] for what, is_at_fault in faults.items()}
    unfit = {id(row) for those in found.values() for row in those}
    counts = ", ".join(f"{len(those)} with {what}" for what, those in found.items() if those)
    notes = [f"{len(unfit)} of {len(rows)} {told}: {counts}"] if unfit else []
    return [row for row in rows if id(row) not in unfit], notes


@contextmanager
def explained_by(notes: Sequence[str]) -> Iterator[None]:
    """Tell what was left out along with what is then missing.

    Raises:
        LabError: that of the block, with the notes behind it.
    """
    try:
        yield
    except LabError as error:
        raise LabError("; ".join([str(error), *notes])) from None


def split_pool(pool: list[Example], sizes: Sizes) -> tuple[list[list[Example]], list[Example]]:
    """Cut the defender's rows into equal, disjoint clean sets, one for each variant, and the recovery set.

    Args:
        pool: clean rows, the first of which are for recovery.
        sizes: of which a variant's clean set is the largest that it gets.

    Raises:
        LabError: too few rows, or too few wanted for a variant.
    """
    if sizes.vaccine < SMALLEST_CLEAN_SET:
        raise LabError(
            f"{sizes.access}.vaccine.rows = {sizes.vaccine}: a variant needs {SMALLEST_CLEAN_SET} clean rows or more"
        )
    size = min(sizes.vaccine, (len(pool) - sizes.recover) // sizes.variants)
    if size < SMALLEST_CLEAN_SET:
        raise LabError(
            f"{len(pool)} clean rows are left for the defender; {sizes.variants} variants and {sizes.recover} recovery "
            f"rows need at least {sizes.least_for_defender}: bring more rows, or set signature.n or "
            f"{sizes.access}.recover.rows lower"
        )
    rest = pool[sizes.recover :]
    return [rest[i * size : (i + 1) * size] for i in range(sizes.variants)], pool[: sizes.recover]
