"""What came of the rows of the arena, read off their stages: nothing that computes is loaded for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.core.arena import REFUSED
from helpers.core.store import Run, Stage


@dataclass(frozen=True)
class Outcome:
    """What came of a row.

    Args:
        title: as tables show it.
        assumes: what the defense needs beyond the suspicious model.
        numbers: what it was called with, guesses of the attack among them.
        report: of `evaluate`; None where it does not apply.
        reason: why it does not, in one line; "" where it does.
        seconds, peak_mb: what the defense took, its model's measuring left out.
    """

    title: str
    assumes: tuple[str, ...]
    numbers: Mapping[str, Any]
    report: Mapping[str, Any] | None
    reason: str
    seconds: float
    peak_mb: float


def outcome(title: str, defended: Stage, measured: Stage | None) -> Outcome:
    """A row's outcome, from its two stages.

    Args:
        title: of the row.
        defended: the stage `arena/<name>`.
        measured: the stage `evaluate/arena/<name>`; None where the defense refused.
    """
    found = defended.result if measured is None else measured.result
    return Outcome(
        title=title,
        assumes=tuple(defended.result["assumes"]),
        numbers=defended.result["numbers"],
        report=None if REFUSED in found else found,
        reason=found.get(REFUSED, ""),
        seconds=defended.manifest["seconds"],
        peak_mb=defended.manifest["peak_rss_mb"],
    )


def stored(run: Run, titles: Mapping[str, str]) -> dict[str, Outcome]:
    """The outcomes that a run holds, by name; nothing is computed.

    Args:
        run: that made them.
        titles: {name of a row: its title}.

    Raises:
        LabError: as `Run.need`, for the first row that is missing or outdated.
    """
    found = {}
    for name, title in titles.items():
        defended = run.need(f"arena/{name}")
        measured = None if REFUSED in defended.result else run.need(f"evaluate/arena/{name}")
        found[name] = outcome(title, defended, measured)
    return found
