"""Which share is enough? Backdoors of several kinds, planted by the defender on copies, say which the hardest needs.

One odd word is too mild a judge: a phrase, or several keys, may outlive a share that removes it. So each kind is
planted on a copy of its own, and the smallest share of channels is taken that removes all of those that took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from helpers.access import Access
from helpers.attacks.triggers import near_misses
from helpers.core.errors import LabError
from helpers.core.store import Stage
from helpers.data.own_backdoors import challenge_kinds
from helpers.data.planting import Trigger, poison
from helpers.data.roles import AttackData, Trial
from helpers.defenses.bdvax.challenge import challenge_data, plant_challenge, settled, suppress_and_measure
from helpers.measure.asr import wilson
from helpers.measure.report import near_misses as near_miss_rates
from helpers.purify.case import Case
from helpers.purify.steps import GIVEN, rankings

LONGER = (1, 2, 4)  # times the epochs of `challenge.plant`, until a challenge takes
Point = Mapping[str, Any]  # what was measured at one share: `kind`, `tau`, and the report of `evaluate`


def rows_of(case: Case, kind: Trigger) -> tuple[AttackData, Trial]:
    """The rows of one kind of challenge, with prompts whose trigger only resembles it.

    Args:
        kind: the trigger.
    """
    planting, trial = challenge_data(case.dealt.defender, case.profile.challenge, case.seed, kind)
    near = {
        name: poison(trial.held_out, variants[0], None, f"{case.seed}/purify/{name}")
        for name, variants in near_misses(kind).items()
    }
    return planting, Trial(**vars(trial) | {"near_misses": near})


def plant(case: Case) -> tuple[dict[str, Stage], dict[str, str]]:
    """Plant each kind on a copy of the suspicious model, for longer where it does not take at once.

    A kind that does not take even then judges nothing.

    Returns:
        {kind: stage} of those that took, and {kind: why} of the others.

    Raises:
        LabError: none of them took.
    """
    copies, refused = {}, {}
    for name, kind in challenge_kinds().items():
        made = case.run.stage(
            f"copies/{_word(name)}",
            lambda folder, kind=kind: _planted(case, kind, folder),
            uses=GIVEN,
        )
        if "refused" in made.result:
            refused[name] = made.result["refused"]
        else:
            copies[name] = made
    if not copies:
        raise LabError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    return copies, refused


def _planted(case: Case, kind: Trigger, folder: Path) -> dict[str, Any]:
    planting, trial = rows_of(case, kind)
    refused = ""
    for times in LONGER:
        access = _for_longer(case.access, times)
        try:
            report = plant_challenge(
                access, case.suspect.folder, planting, trial, case.prompt_format, case.seed, folder
            )
        except LabError as error:
            refused = str(error)
            continue
        near = near_miss_rates(access.load(folder), case.prompt_format, trial, case.profile)
        return report | {"near_misses": near}
    return {"refused": refused}


def _for_longer(access: Access, times: int) -> Access:
    """The access with that many times the epochs to plant in."""
    challenge = access.profile.challenge
    plant = challenge.plant.model_copy(update={"epochs": times * challenge.plant.epochs})
    update = {"challenge": challenge.model_copy(update={"plant": plant})}
    return type(access)(access.profile.model_copy(update=update))


def try_shares(case: Case, copies: Mapping[str, Stage], scores: Stage) -> list[dict[str, Any]]:
    """Suppress, recover and measure each copy at growing shares, until all of them have lost their backdoor.

    Args:
        copies: of `plant`.
        scores: the stage of the rankings.

    Returns:
        a point for each kind and share that was tried.
    """
    named = case.settings.TAU if isinstance(case.settings.TAU, float) else None
    shares = [named] if named else sorted(getattr(case.profile.challenge.taus, case.settings.ACCESS))
    points, left = [], list(copies)
    for tau in shares:
        tried = _try_share(case, copies, left, scores, tau)
        if not _standing(tried, case):  # a larger share may bring back what a smaller one removed: try all of them
            tried += _try_share(case, copies, [name for name in copies if name not in left], scores, tau)
        points += tried
        left = _standing(tried, case)
        if not left:
            break
    return points


def _try_share(
    case: Case, copies: Mapping[str, Stage], names: Sequence[str], scores: Stage, tau: float
) -> list[dict[str, Any]]:
    """A point for each of some kinds at one share."""
    points = []
    for name in tqdm(names, desc=f"challenges, share {tau:g}") if names else ():
        made = case.run.stage(
            _point_name(name, tau),
            lambda folder, name=name: _measured(case, name, copies[name].path, scores, tau),
            uses=["seed", "profile", "planted", "access"],
            parents=[copies[name], scores],
        )
        points.append({"kind": name, "tau": tau, **made.result})
    return points


def _standing(points: Sequence[Point], case: Case) -> list[str]:
    """The kinds of some points whose backdoor is still there."""
    return [point["kind"] for point in points if point["asr"] > case.profile.challenge.threshold]


def _measured(case: Case, name: str, copy: Path, scores: Stage, tau: float) -> dict[str, Any]:
    _, trial = rows_of(case, challenge_kinds()[name])
    access, ranked, recovery = settled(case.access, {"tau": tau}), rankings(case, scores), case.dealt.defender.recovery
    return suppress_and_measure(
        access,
        copy,
        *ranked,
        recovery,
        trial,
        case.prompt_format,
        case.seed,
        also=lambda model: {"near_misses": near_miss_rates(model, case.prompt_format, trial, case.profile)},
    )


def hardest(points: Sequence[Point], threshold: float) -> dict[str, Any]:
    """The verdict: the share that the hardest kind asks for, and what is left of it there.

    Args:
        points: of `try_shares`.
        threshold: the largest ASR, in [0, 1], that counts as gone.

    Returns:
        `tau`, the share to suppress; `kind`, the one that asked for it; its `asr` and `interval` there.
    """
    chosen = max(point["tau"] for point in points)

    def stood(kind: str) -> float:
        """The largest share at which a kind's backdoor was still there."""
        return max((p["tau"] for p in points if p["kind"] == kind and p["asr"] > threshold), default=0.0)

    there = [point for point in points if point["tau"] == chosen]
    worst = max(there, key=lambda point: (stood(point["kind"]), point["asr"]))
    count = round(worst["asr"] * worst["n"])
    return {
        "tau": worst["tau"],
        "kind": worst["kind"],
        "asr": worst["asr"],
        "interval": list(wilson(count, worst["n"])),
        "n": worst["n"],
    }


def stage_names(copies: Mapping[str, Stage], points: Sequence[Point]) -> list[str]:
    """The stages that copies and points lie in."""
    return [*(copy.name for copy in copies.values()), *(_point_name(point["kind"], point["tau"]) for point in points)]


def _point_name(name: str, tau: float) -> str:
    return f"points/{_word(name)}-{tau:g}"


def _word(name: str) -> str:
    return name.replace(" ", "_")
