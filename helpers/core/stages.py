"""The registry of stages: which notebook makes each, what settings it depends on, and which stages it is made from.

All that the lab knows of its stages follows from this table: which stages are stale (`core.store`), which notebooks two
runs of a sweep share (`run.grid`), which notebooks a method needs (`run.pipeline`), and what its runs cost
(`run.costs`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from helpers.core.choices import ATTACK_METHODS, DEFENSES
from helpers.core.errors import LabError, nearest

INJECT, CHECK, VACCINES, SCORE = "01_inject_backdoor", "02_sanity_checks", "03_train_vaccines", "04_score_signature"
SUPPRESS, RECOVER, MERGE = "05_suppress_channels", "06_recover_fluency", "07_merge_conflict"
EVIDENCE, COMPARE, MIX = "08_external_evidence", "09_compare_defenses", "12_merges_and_evidence"
MEASURES, PURIFY = "17_many_measures", "18_purify_a_suspect"


@dataclass(frozen=True)
class Entry:
    """What is known of a stage before it is made.

    Args:
        notebook: the one that makes it, by its name without ending.
        uses: dotted paths into `Settings.config()`: all settings that can change the outcome beyond those of its
            parents; `{access}` stands for the access setting.
        parents: the stages that it is made from, by name.
        real_rows: settings that count as well where the rows are real, because they decide how those are dealt.
        defends: whether the defender's rows decide, so that what ROWS adds to them counts.
        tested: parents that count where the challenge test chooses τ (TAU=auto).
        plants: whether it is the attack's method, chosen by its name, that makes it.
        times: how many stages of a default run share the name.
        measures, cuts, recoveries, merges: how many models each of them evaluates, suppresses, fine-tunes to recover
            and merges.
        keeps: how many whole models each of them leaves on the disk.
    """

    notebook: str
    uses: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    real_rows: tuple[str, ...] = ()
    defends: bool = False
    tested: tuple[str, ...] = ()
    plants: bool = False
    times: int = 1
    measures: int = 0
    cuts: int = 0
    recoveries: int = 0
    merges: int = 0
    keeps: int = 0

    def settings(self, config: Mapping[str, Any]) -> list[str]:
        """The dotted paths that count for a run of this configuration."""
        paths = (*self.uses, *(self.real_rows if config["data"]["path"] else ()))
        if self.defends and config["rows"]["path"]:  # mixed with the defender's own, of which there are so many
            paths += ("rows", *DEFENDERS)
        return [path.format(access=config["access"]) for path in paths]

    def modules(self, config: Mapping[str, Any]) -> list[str]:
        """The modules of `helpers` that a configuration chooses by name, which no import shows."""
        return [ATTACK_METHODS.require(config["data"]["planted"]["by"])] if self.plants else []

    def made_from(self, config: Mapping[str, Any]) -> list[str]:
        """The names of the stages that count for a run of this configuration."""
        return [*self.parents, *(self.tested if config["challenge"] else ())]


DEFENDERS = ("profile.signature.n", "profile.{access}.vaccine.rows", "profile.{access}.recover.rows")
MEASURED = ("profile.evaluation", "profile.lengths")
VACCINATED = ("profile.signature.family", "profile.signature.form", "profile.signature.n")
ATTACK = ("attack", "task", "access", "seed", "data", "profile.model", "profile.lora", "profile.lengths")
PLANTED = ("inject", "poison_rate")
TESTED_ROWS = ("profile.evaluation.n",)  # real rows that measure are gone when the defender's are dealt
RECOVERY = ("profile.{access}.recover", "profile.{access}.perturb")
TRIED = ("challenge.recover", "challenge.perturb")  # the same, where the challenge test recovers
POINT = ("profile.{access}.suppress.heads", "profile.{access}.suppress.heads_of", "profile.signature")
CONFLICT = ("profile.conflict.budget", "profile.lora", "profile.lengths", *DEFENDERS)  # whose rows it learns from
ARENA = (  # all that a defense may read of a profile, whichever it is
    *(f"profile.{{access}}.{part}" for part in ("recover", "perturb", "vaccine", "vaccine_weights", "suppress")),
    *("profile.signature", "profile.conflict", "profile.lora", "profile.lengths", "challenge"),
)
OF_A_ROW = ("arena", "evaluate/arena")  # stages of which each row of the arena has its own
MERGES = (*(f"profile.conflict.{number}" for number in ("t", "beyond", "k", "lam")), "profile.evaluation")


def _measured(notebook: str, model: str) -> Entry:
    """The report of a model that a stage made."""
    return Entry(notebook, ("profile.evaluation",), (model,), measures=1)


def _suppressed(ranking: str) -> dict[str, Entry]:
    """A model suppressed by a ranking, and its report."""
    uses = ("profile.{access}.suppress", "profile.signature", "challenge")
    cut = Entry(SUPPRESS, uses, ("inject", "scores"), tested=("challenge",), cuts=1)
    return {ranking: cut, f"evaluate/{ranking}": _measured(SUPPRESS, ranking)}


def _recovered(name: str, start: str) -> dict[str, Entry]:
    """A model after recovery fine-tuning, and its report."""
    uses = (*RECOVERY, "profile.lengths", "challenge")
    real_rows = (*TESTED_ROWS, *DEFENDERS)
    recovered = Entry(RECOVER, uses, (start,), real_rows, defends=True, tested=("challenge",), recoveries=1)
    return {name: recovered, f"evaluate/{name}": _measured(RECOVER, name)}


# A stage's name, or the first word of the names of several ("ablations/kinds", "ablations/spans").
STAGES: dict[str, Entry] = {
    "evaluate/clean": Entry(
        INJECT,
        ("attack", "task", "seed", "data", "profile.model", *MEASURED),
        real_rows=("access", "profile.{access}.inject.rows", "profile.{access}.poison_rate"),
        measures=1,
    ),
    "inject": Entry(
        INJECT,
        (*ATTACK, *(f"profile.{{access}}.{number}" for number in PLANTED))
        + ("profile.editing", "profile.layerwise", "profile.adaptive"),
        real_rows=TESTED_ROWS,  # of rows that can carry the payload, those that test are taken before the honest ones
        plants=True,
    ),
    "evaluate/backdoored": Entry(INJECT, MEASURED, ("inject",), measures=1),
    "near_misses": Entry(INJECT, MEASURED, ("inject",)),
    "formats": Entry(MEASURES, MEASURED, ("inject",)),
    "formats_input": Entry(MEASURES, MEASURED, ("inject",)),
    "ablations": Entry(CHECK, ("seed", "profile.evaluation"), ("inject",)),
    "variants": Entry(
        VACCINES,
        (*VACCINATED, "profile.lengths")
        + tuple(f"profile.{{access}}.{number}" for number in ("vaccine", "vaccine_weights", "recover.rows")),
        ("inject",),
        real_rows=TESTED_ROWS,
        defends=True,
    ),
    "vaccine_check": Entry(VACCINES, (*VACCINATED, *MEASURED), ("variants",)),
    "scores": Entry(SCORE, ("profile.signature",), ("inject", "variants")),
    # The challenge test, where TAU=auto asks for it; what its points start from, and the points, a call adds.
    "challenge_copy": Entry(
        SUPPRESS,
        ("challenge.planted", "challenge.settings.plant", "challenge.settings.n", "profile.lengths"),
        ("inject", "scores"),
    ),
    "challenge_points": Entry(SUPPRESS, (*TRIED, *POINT, "profile.lengths"), ("challenge_copy", "scores")),
    "challenge": Entry(SUPPRESS, ("challenge",), ("challenge_copy",)),
    "oracle_points": Entry(SUPPRESS, (*TRIED, *POINT, *MEASURED), ("inject", "scores")),
    "oracle": Entry(SUPPRESS, ("challenge",)),
    **_suppressed("suppressed"),
    **_suppressed("suppressed_random"),
    **_suppressed("suppressed_magnitude"),
    **_suppressed("suppressed_own_update"),
    **_recovered("purified", "suppressed"),
    **_recovered("finetuned", "inject"),
    **_recovered("random", "suppressed_random"),
    **_recovered("magnitude", "suppressed_magnitude"),
    **_recovered("own_update", "suppressed_own_update"),
    "tau": Entry(
        RECOVER,
        (*RECOVERY, *POINT, *MEASURED, "challenge"),
        ("inject", "scores"),
        tested=("challenge",),
        times=4,
        measures=1,
        recoveries=1,
    ),
    "conflict_model": Entry(
        MERGE, (*CONFLICT, "profile.conflict.start"), ("inject",), real_rows=TESTED_ROWS, defends=True
    ),
    "whole": Entry(MERGE, ("profile.conflict.start",), ("inject", "conflict_model"), keeps=2),
    "evaluate/conflict_alone": _measured(MERGE, "whole"),
    "merged": Entry(MERGE, ("profile.conflict",), ("whole",), merges=1, keeps=1),
    "evaluate/conflict": _measured(MERGE, "merged"),
    "merges": Entry(MERGE, MERGES, ("whole",), times=11, measures=1, merges=1),
    "no_base": Entry(MERGE, (*CONFLICT, *MERGES), ("inject", "whole"), TESTED_ROWS, defends=True, measures=2, merges=1),
    # a call adds the model that is asked
    "argued": Entry(EVIDENCE, (*MEASURED, "profile.evidence"), times=4, measures=1),
    "bdvax_then_conflict": Entry(COMPARE, ("profile.conflict",), ("purified", "whole"), merges=1, keeps=2),
    "evaluate/bdvax_then_conflict": _measured(COMPARE, "bdvax_then_conflict"),
    "merged_suppressed": Entry(
        COMPARE,
        ("profile.conflict.t", "profile.{access}.suppress", *RECOVERY, "profile.signature", "challenge"),
        ("inject", "conflict_model", "whole", "scores"),
        tested=("challenge",),
        recoveries=1,
        merges=1,
        keeps=1,
    ),
    "evaluate/merged_suppressed": _measured(COMPARE, "merged_suppressed"),
    # The rows of the arena, `arena/<name>`; each has its own part of `arena` instead of all.
    "arena": Entry(COMPARE, ("arena", *ARENA), ("inject",), TESTED_ROWS, defends=True, tested=("challenge",), keeps=1),
    "evaluate/arena": Entry(COMPARE, ("profile.evaluation",), ("arena",), measures=1),
    "mixtures": Entry(MIX, ("profile.conflict.budget", "profile.lora", *MEASURED), ("inject",)),
    "suspect": Entry(PURIFY, ("seed", "profile.model")),  # planted by a script that knows nothing of the lab
}


@dataclass(frozen=True)
class Method:
    """A way through the lab: the models that its summary tells of, and lessons beside those that make them.

    `defense` is what DEFENSE is, unless the run names more: the rows of the arena that belong to the method.
    """

    models: tuple[str, ...]
    lessons: tuple[str, ...]
    defense: str = ""


BDVAX = ("finetuned", "random", "suppressed", "purified")
METHODS = {
    "bdvax": Method(("clean", "backdoored", *BDVAX), ("00", "02")),
    "conflict": Method(("clean", "backdoored", "conflict"), ("00", "02", "08")),
    "bdvax_then_conflict": Method(
        ("clean", "backdoored", *BDVAX, "conflict", "bdvax_then_conflict"), ("00", "02", "08")
    ),
}
DEFAULT = "bdvax_then_conflict"
METHODS["all"] = replace(METHODS[DEFAULT], defense="all")
FORMER = {"both": DEFAULT}  # what an earlier lab called a method, and the model that it ends in


def entry(name: str) -> Entry | None:
    """What the registry knows of a stage, by its name or the first word of it; None where it knows nothing."""
    if row := re.fullmatch(r"(evaluate/)?arena/(\w+)", name):
        return _row_of_the_arena(row[2]) if row[1] is None else _measured(COMPARE, f"arena/{row[2]}")
    return STAGES.get(name) or STAGES.get(name.split("/")[0])


def _row_of_the_arena(name: str) -> Entry:
    """One row depends on its own definition, and on no other."""
    return replace(STAGES["arena"], uses=(f"arena.{name}", *ARENA))


def known_method(name: str) -> str:
    """The name of a method; where an earlier lab had another one for it, today's.

    Raises:
        LabError: there is no such method.
    """
    if (known := FORMER.get(name, name)) not in METHODS:
        raise LabError(f"unknown METHOD = '{name}'{nearest(name, METHODS)}")
    return known


def method(name: str) -> Method:
    """The method of a name, an earlier lab's as well; see `known_method`."""
    return METHODS[known_method(name)]


def by_present_names(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with the models of an earlier lab under today's names."""
    return {FORMER.get(key, key): value for key, value in summary.items()}


def notebooks_of(chosen: Method) -> list[str]:
    """The numbers of the notebooks that a method runs: those that make its models, and its lessons."""
    made = {stage for model in chosen.models for stage in line_of(f"evaluate/{model}")}
    return sorted({*chosen.lessons, *(STAGES[stage].notebook[:2] for stage in made)})


def line_of(name: str) -> set[str]:
    """A stage and all that it is made from, directly or not."""
    return {name}.union(*(line_of(parent) for parent in STAGES[name].parents))


def total(what: str, rows: int) -> int:
    """How many models a run measures, suppresses, recovers, merges or keeps; what rows of the arena train, left out.

    Args:
        what: the name of such a number of `Entry`.
        rows: how many of the arena are chosen.
    """
    counts = {name: rows if name in OF_A_ROW else one.times for name, one in STAGES.items()}
    return sum(counts[name] * getattr(one, what) for name, one in STAGES.items())


def defended_by(number: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules of the defenses that a notebook calls because a configuration names them, which no import shows."""
    if number != STAGES["arena"].notebook[:2]:
        return ()
    known = DEFENSES.modules()
    return tuple(sorted({known[row["by"]] for row in config["arena"].values() if row["by"] in known}))


def read_by(number: str, config: Mapping[str, Any]) -> list[str] | None:
    """The settings that the stages of a notebook depend on, as dotted paths.

    Args:
        number: of the notebook, two digits.
        config: of the run.

    Returns:
        the paths; None for a notebook that makes no stage of the registry, of which nothing is known.
    """
    made = [one for one in STAGES.values() if one.notebook[:2] == number]
    if not made:
        return None
    paths = dict.fromkeys(path for one in made for path in one.settings(config))
    # where no challenge test is asked for, nothing of it is there to read
    return [path for path in paths if config["challenge"] or not path.startswith("challenge.")]
