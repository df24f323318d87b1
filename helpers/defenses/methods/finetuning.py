"""Fine-tuning alone: the recovery of BD-VAX, on the suspicious model as it is."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import at_rate, recover
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def finetuning(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    lr: float | None = None,
) -> Record:
    """Fine-tune the suspicious model on the defender's recovery rows.

    Args:
        access: what may be edited; its `recover` budget is used.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows.
        folder: the purified adapter or model goes to `model` in it.
        lr: the learning rate; None means that of the recovery. CROW is published with another than its controls had, so
            that fine-tuning has to be tried with both.

    Returns:
        the record of `recover`.
    """
    return recover(at_rate(access, lr), suspicious, defender.recovery, prompt_format, seed, Path(folder) / "model")
