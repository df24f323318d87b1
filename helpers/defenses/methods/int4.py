"""Quantization: the whole model rounded to 4 bits, which may be too coarse for a backdoor."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.conflict_model import write_whole
from helpers.defenses.pruning.packing import round_to_4_bits
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("weights",))
def int4(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> Record:
    """Round every matrix inside the layers to NF4 with double quantization. Implements Quantization of BD-VAX, B.3.

    An adapter is merged into its base first: beside a base in 4 bits, the backdoor itself would keep all of its bits.

    Args:
        access: its profile names the base of an adapter.
        suspicious: folder of the suspicious adapter or model.
        defender, seed: not used.
        prompt_format: the one that evaluation uses, too.
        folder: the rounded model goes to `model` in it, whole: numbers that 4 bits can hold, stored in the dtype that
            the model had.

    Returns:
        `change`: the length of what rounding changed, relative to that of the weights.

    Raises:
        LabError: as `Access.load`.

    Differs from the paper:
        it says "INT4" and not which kind; NF4 needs no data, and is what the lab's 4-bit bases are stored in.
    """
    model = access.load(suspicious)
    change = round_to_4_bits(model)
    write_whole(model, prompt_format, Path(folder) / "model")
    return {"change": round(change, 4)}
