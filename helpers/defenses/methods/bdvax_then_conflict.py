"""Both papers one after the other: what BD-VAX has purified takes the suspicious model's place in the merge."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.methods.bdvax import bdvax
from helpers.defenses.methods.conflict import conflict
from helpers.defenses.registry import Record, defense, joined
from helpers.model.prompt import PromptFormat


@defense(**joined(bdvax, conflict))
def bdvax_then_conflict(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    kind: str = "",
) -> Record:
    """Purify by BD-VAX, then merge with a conflict model of the suspicious one.

    Args:
        access, suspicious, defender, prompt_format, seed: as in `bdvax` and `conflict`.
        folder: the merged model goes to `model` in it, what `bdvax` makes to `purified`.
        kind: as in `bdvax`.

    Returns:
        the records of both, by name.

    Raises:
        LabError: as both.
    """
    first = Path(folder) / "purified"
    purified = bdvax(access, suspicious, defender, prompt_format, seed, first, kind)
    merged = conflict(access, suspicious, defender, prompt_format, seed, folder, cured=first / "model")
    return {"bdvax": purified, "conflict": merged}
