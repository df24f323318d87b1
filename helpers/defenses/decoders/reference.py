"""The reference model: the conflict model, which stands beside the suspicious one and is not merged into it."""

from pathlib import Path

from helpers.core.profile import Profile
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import train_conflict, write_conflict
from helpers.defenses.registry import Record
from helpers.model.prompt import PromptFormat


def write_reference(
    profile: Profile,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    adapter: Path | str,
    folder: Path | str,
) -> Record:
    """Train the conflict model of information conflicts (§3.3) and write it whole.

    Args:
        profile: its `conflict` block says how, and from which model.
        suspicious: folder of the suspicious adapter or model.
        defender: `conflict.budget.rows` of his rows are used, those for recovery first.
        prompt_format, seed: as in `train_conflict`.
        adapter: folder for what was trained.
        folder: for the whole model.

    Returns:
        the record of `train_conflict`.
    """
    rows = defender.rows(profile.conflict.budget.rows)
    record = train_conflict(profile, suspicious, rows, prompt_format, seed, adapter)
    write_conflict(profile, suspicious, adapter, folder)
    return record
