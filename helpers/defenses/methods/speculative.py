"""Speculative decoding (Leviathan et al. 2023): one model drafts, another verifies. It loses nothing of the verifier.

Which is why it is no defense where the suspicious model verifies: its payload passes. Where the reference verifies, the
suspicious model has no say in what is written. Both rows show what a check is worth that leaves the verifier's answer
as it is.
"""

from pathlib import Path
from typing import Literal

from helpers.access import Access
from helpers.core.errors import LabError, nearest
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import write_suspicious
from helpers.defenses.decoders.reference import write_reference
from helpers.defenses.decoding import write_decoding
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat

VERIFIERS = ("suspicious", "reference")


@defense(
    assumes=("clean rows", "clean base", "reference model", "decoding"), trains=("conflict",), beside=("evaluate",)
)
def speculative(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    verifier: Literal["suspicious", "reference"] = "suspicious",
) -> Record:
    """Decode with the suspicious model and a conflict model, one drafting and the other verifying; no weight changes.

    Args:
        access, suspicious, defender, prompt_format, seed: as in `cleangen`.
        folder: the model that verifies goes to `model` in it, whole, beside the other one as `draft`, `adapter` and
            `decoding.json`.
        verifier: whose greedy answer is written. Information conflicts, Table 1, has the backdoored model's rates
            nearly unchanged, so there it is the suspicious one.

    Returns:
        the record of `train_conflict`.

    Raises:
        LabError: another verifier.
    """
    if verifier not in VERIFIERS:
        raise LabError(f"verifier = '{verifier}' is unknown{nearest(verifier, VERIFIERS)}")
    place, profile = Path(folder), access.profile
    names = {verifier: place / "model", next(name for name in VERIFIERS if name != verifier): place / "draft"}
    record = write_reference(profile, suspicious, defender, prompt_format, seed, place / "adapter", names["reference"])
    write_suspicious(profile, suspicious, names["suspicious"])
    write_decoding(place, "speculative", "draft", verifier=verifier)
    return record
