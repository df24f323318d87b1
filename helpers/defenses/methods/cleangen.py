"""CleanGen (Li et al. 2024): a reference model watches each token, and replaces those it finds far less likely."""

from pathlib import Path

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import write_suspicious
from helpers.defenses.decoders.reference import write_reference
from helpers.defenses.decoding import write_decoding
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(
    assumes=("clean rows", "clean base", "reference model", "decoding"), trains=("conflict",), beside=("evaluate",)
)
def cleangen(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    alpha: float = 20.0,
) -> Record:
    """Let the suspicious model answer under the eyes of a conflict model; no weight changes. See `SuspicionCheck`.

    Args:
        access: of its profile `conflict` says how the reference is trained; the model's path is the clean base.
        suspicious: folder of the suspicious adapter or model.
        defender: `conflict.budget.rows` of his rows train the reference.
        prompt_format: the one that evaluation uses, too.
        seed: of the reference's training.
        folder: the suspicious model goes to `model` in it, whole, beside `reference`, `adapter` and `decoding.json`.
        alpha: α, the suspicion score from which a token is replaced; 0 or more. CleanGen, §5.1: 20.

    Returns:
        the record of `train_conflict`.

    Raises:
        LabError: a negative α.

    Differs from the paper:
        the reference is the conflict model, as in information conflicts (Appendix A), not another model of the same
        size; there is no look-ahead (k = 4 there), so that the end of an answer is checked as well.
    """
    if not alpha >= 0:
        raise LabError(f"alpha = {alpha} is no suspicion score; use 0 or more, CleanGen has 20")
    place, profile = Path(folder), access.profile
    adapter, reference = place / "adapter", place / "reference"
    record = write_reference(profile, suspicious, defender, prompt_format, seed, adapter, reference)
    write_suspicious(profile, suspicious, place / "model")
    write_decoding(place, "cleangen", reference.name, alpha=alpha)
    return record
