"""Clean rows that ROWS brings along: the defender's alone, beside those that DATA leaves him."""

from collections.abc import Iterable, Mapping

from helpers.core.errors import LabError
from helpers.core.settings import Settings
from helpers.data.example import Example, distinct, prompt_of
from helpers.data.roles import AttackData, TestData
from helpers.data.rows import load_rows
from helpers.run.deal.shares import Condition, without_attack


def further_rows(settings: Settings, faults: Mapping[str, Condition]) -> tuple[list[Example], list[str]]:
    """The rows of ROWS, each prompt once; none where it is empty.

    Args:
        settings: the run's.
        faults: what makes a row unfit to be a clean one; see `without_attack`.

    Returns:
        the rows, and a note where some are left out.

    Raises:
        LabError: as `load_rows`, or none of the rows is fit.
    """
    if not settings.ROWS:
        return [], []
    fit, notes = without_attack(load_rows(settings.ROWS), faults, f"rows of {settings.ROWS} are left out")
    if not fit:
        raise LabError(f"ROWS = '{settings.ROWS}' brings no clean row: {notes[0]}")
    return distinct(fit), notes


def require_unseen(rows: Iterable[Example], attack: AttackData, test: TestData, source: str) -> None:
    """Refuse rows of the defender that attacker or examiner have: a cure must not learn the exam.

    Args:
        rows: of `further_rows`.
        attack, test: what the others have.
        source: where the rows are from.

    Raises:
        LabError: how many of them are whose, and the first.
    """
    others = {
        "the attacker's": attack.clean + attack.poisoned,
        "the examiner's": test.held_out + test.triggered + test.near_misses.get("absent", []),
    }
    for whose, theirs in others.items():
        seen = {prompt_of(row) for row in theirs}
        if both := [row for row in rows if prompt_of(row) in seen]:
            raise LabError(
                f"ROWS = '{source}': {len(both)} of its prompts are {whose} as well, the first "
                f"{both[0].question[:60]!r}: leave them out, or bring rows that nobody else has"
            )
