"""The whole of it: look, vaccinate, score, challenge, suppress, recover, merge, measure, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.core.disk import working_in, write_json
from helpers.core.settings import AUTO
from helpers.core.store import Stage
from helpers.defenses.registry import assumed_by
from helpers.purify import challenges, report, steps
from helpers.purify.case import Case, open_case
from helpers.purify.export import export


@dataclass(frozen=True)
class Report:
    """What a purification left.

    Args:
        folder: of the run: `purified/`, `report.html` and `report.json` lie in it.
        values: what stands in `report.json`.
        verdict: what a reader has to know first, as sentences.
    """

    folder: Path
    values: dict[str, Any]
    verdict: list[str]

    @property
    def purified(self) -> Path:
        """The purified adapter or model."""
        return self.folder / "purified"


def purify(
    suspect: str,
    base: str = "",
    rows: str = "",
    triggered: str = "",
    markers: str = "",
    method: str = "bdvax",
    name: str = "",
    profile: str = "",
    seed: int = 0,
    tau: str = AUTO,
    overrides: Mapping[str, Any] | None = None,
) -> Report:
    """Purify a model that somebody was given; its own files stay as they are.

    Args:
        suspect, base, rows, triggered, markers, method, name, profile, seed, tau, overrides: see `open_case`.

    Raises:
        LabError: whatever was brought cannot be used, or no challenge took.
    """
    case = open_case(suspect, base, rows, triggered, markers, method, name, profile, seed, tau, dict(overrides or {}))
    for note in case.notes():
        print(note)
    with working_in(case.run.folder):
        return _purified(case)


def _purified(case: Case) -> Report:
    before = steps.measure(case, "suspicious", case.suspect.folder, [])
    made, suppressed, judged, judges = None, None, None, []
    if case.method != "conflict":
        scores = steps.score(case, steps.vaccinate(case))
        tau, judged, judges = _share(case, scores)
        made = steps.suppress(case, scores, tau)
        suppressed = made.result
    if case.method != "bdvax":
        made = steps.merge(case, made and made.path / "model", [made] if made else [])
    purified = case.run.folder / "purified"
    export(case, made.path / "model", purified)
    after = steps.measure(case, "purified", purified, [made])  # in the dtype that the user gets
    used = _line(case, [before.name, after.name, *judges])
    values = report.build(case, before.result, after.result, suppressed, judged, assumed_by(case.method), used)
    threshold = case.profile.challenge.threshold
    write_json(case.run.folder / "report.json", values)
    report.write_page(values, threshold, case.run)
    return Report(case.run.folder, values, report.verdict(values, threshold))


def _line(case: Case, wanted: list[str]) -> list[Stage]:
    """Stages and all that they were made from; a run may hold others."""
    made = {stage.name: stage for stage in case.run.stages()}
    found: dict[str, Stage] = {}
    while wanted:
        if (name := wanted.pop()) not in found:
            found[name] = made[name]
            wanted += made[name].manifest["parents"]
    return list(found.values())


def _share(case: Case, scores: Stage) -> tuple[float, dict[str, Any], list[str]]:
    """The share to suppress, what the challenges said, and in which stages; a share that was named is judged, too."""
    copies, refused = challenges.plant(case)
    points = challenges.try_shares(case, copies, scores)
    verdict = challenges.hardest(points, case.profile.challenge.threshold)
    judged = {
        "verdict": verdict,
        "points": points,
        "copies": {name: copy.result for name, copy in copies.items()},
        "refused": refused,
    }
    return verdict["tau"], judged, challenges.stage_names(copies, points)
