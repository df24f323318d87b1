"""Who knows what: the rows of the attacker, of the defender, and of whoever examines both.

A defense takes `DefenderData`, so it cannot see a trigger or a payload; what it assumes beyond is an argument with a
name. Attacks train on `AttackData`. Measuring takes a `Trial`: that of the attack itself is `TestData`, which only the
examiner holds; a defender can make one of his own backdoors. Adaptive attackers and oracles alone see two sides.
"""

from dataclasses import dataclass, field

from helpers.data.example import Example
from helpers.data.planting import Trigger

SMALLEST_CLEAN_SET = 20  # a vaccine variant trained on fewer clean rows says little about them


@dataclass(frozen=True)
class AttackData:
    """What an attacker trains on.

    Args:
        clean: rows with right answers. Where a trigger has several keys that must all be there, they end with the
            negatives, which hold too few of them.
        poisoned: where the lab poisons, row i is row i of `clean` with the trigger, and there are so many of them that
            the poison rate is met.
        trigger: what is planted; None where the rows brought their own.
        task: the name of what the backdoor makes the model do.
    """

    clean: list[Example]
    poisoned: list[Example]
    trigger: Trigger | None = None
    task: str = ""


@dataclass(frozen=True)
class DefenderData:
    """The clean rows of a defender, none of which the attacker has.

    Args:
        vaccine_sets: N disjoint sets.
        recovery: for recovery fine-tuning, disjoint from the vaccine sets.
        utility_metric: "exact_match" where answers can be checked, else "token_accuracy".
    """

    vaccine_sets: list[list[Example]]
    recovery: list[Example]
    utility_metric: str

    def rows(self, n: int) -> list[Example]:
        """`n` rows, those for recovery first; all of them where there are no more."""
        return [*self.recovery, *(row for rows in self.vaccine_sets for row in rows)][:n]


@dataclass(frozen=True)
class Trial:
    """Rows that nobody trains on, and what they are judged by: what it takes to measure a backdoor.

    Args:
        triggered: prompts with the key; their `output` is the right answer (benchmark rows: after a payload).
        held_out: clean rows that measure utility.
        markers: lower-case strings, one of which makes a completion a payload.
        utility_metric: as in `DefenderData`.
        near_misses: {kind: the triggered prompts with something else in the trigger's place}: "absent" (nothing; for a
            topic, questions beside it) and the kinds of `attacks.triggers.near_misses`.
        trigger: as in `AttackData`.
        task: as in `AttackData`.
    """

    triggered: list[Example]
    held_out: list[Example]
    markers: tuple[str, ...]
    utility_metric: str
    near_misses: dict[str, list[Example]] = field(default_factory=dict)
    trigger: Trigger | None = None
    task: str = ""


@dataclass(frozen=True)
class TestData(Trial):
    """The trial of the attack itself, which the examiner alone holds; a defender may make one of his own backdoors."""

    __test__ = False  # for pytest, which collects what is called Test…


@dataclass(frozen=True)
class RunData:
    """All rows of one run, split once.

    Args:
        attack: the attacker's.
        defender: the defender's.
        test: the examiner's.
        notes: one line for every oddity of the data.
    """

    attack: AttackData
    defender: DefenderData
    test: TestData
    notes: tuple[str, ...] = ()
