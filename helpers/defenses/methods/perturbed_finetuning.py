"""Fine-tuning on perturbed prompts: clean rows that each hold something odd, with their right answers."""

from collections.abc import Sequence
from pathlib import Path

from helpers.access import Access
from helpers.core.checking import checked
from helpers.core.profile import Perturbation
from helpers.data.roles import DefenderData
from helpers.defenses.methods.finetuning import finetuning
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat

KINDS = ("made_up", "several")  # the best of eight choices on a development seed


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def perturbed_finetuning(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    kinds: Sequence[str] = KINDS,
    copies: int = 1,
    rows: int | None = None,
) -> Record:
    """Fine-tune the suspicious model on the defender's recovery rows, something odd inserted into each.

    Args:
        access: what may be edited; its `recover` budget is used, its `perturb` is not read.
        suspicious, defender, prompt_format, folder: as in `finetuning`.
        seed: of what is inserted, and of the order of the rows.
        kinds, copies, rows: as in `Perturbation`. With "compound" among the kinds the defender knows the shape of the
            attacker's key, which the others do not take for granted.

    Returns:
        the record of `recover`; with more rows than clean ones it takes as many more steps.

    Raises:
        LabError: a kind or number that `Perturbation` does not take.
    """
    numbers = checked(Perturbation, {"kinds": kinds, "copies": copies, "rows": rows}, "perturbed_finetuning: ")
    return finetuning(access.with_settings(perturb=numbers), suspicious, defender, prompt_format, seed, folder)
