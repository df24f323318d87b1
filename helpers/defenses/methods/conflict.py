"""An internal conflict (Chen et al.): a second opinion from a few clean rows is merged into the suspicious model."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.conflict import merge
from helpers.defenses.conflict.conflict_model import train_conflict, write_conflict, write_suspicious
from helpers.defenses.registry import Record, defense
from helpers.model.checkpoint import local_folder
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights", "clean base"), trains=("conflict",))
def conflict(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    cured: Path | str | None = None,
) -> Record:
    """Train a conflict model and merge it with the suspicious one. Implements information conflicts, §3.3.

    Args:
        access: of its profile `conflict` says how; the model's path is the clean base.
        suspicious: folder of the suspicious adapter or model.
        defender: `conflict.budget.rows` of his rows are used, those for recovery first.
        prompt_format: the one that evaluation uses, too.
        seed: fresh LoRA matrices and the order of the rows.
        folder: the merged model goes to `model` in it, whole, beside `adapter` and both models as `suspicious` and
            `conflict`.
        cured: folder of what is merged in the suspicious model's place, where another defense came first.

    Returns:
        the record of `train_conflict`.

    Raises:
        LabError: as `merge.merge`.
    """
    profile, place = access.profile, Path(folder)
    adapter, first, second = place / "adapter", place / "suspicious", place / "conflict"
    rows = defender.rows(profile.conflict.budget.rows)
    record = train_conflict(profile, suspicious, rows, prompt_format, seed, adapter)
    write_suspicious(profile, cured or suspicious, first)
    write_conflict(profile, suspicious, adapter, second)
    merge.merge(profile.conflict, first, second, local_folder(profile.model), place / "model")
    return record
