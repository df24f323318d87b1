"""Neural attention distillation (NAD, Li et al. 2021): the suspicious model learns from a fine-tuned copy of itself."""

from functools import partial
from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.methods.finetuning import finetuning
from helpers.defenses.registry import Record, defense
from helpers.defenses.regularizers.attention_maps import DistillingTrainer
from helpers.defenses.regularizers.base import told
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("recover", "recover"), beside=("recover",))
def nad(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    beta: float = 3000.0,
) -> Record:
    """Fine-tune on the recovery rows with the loss CE + β · Σ_l MSE(A(F_s), A(F_t)).

    The teacher is what `finetuning` makes of the suspicious model, the student the suspicious model itself, and A the
    attention map of `attention_map`. With β = 0 this is `finetuning`. The recovery budget is spent twice.

    Neither layers nor β are stated for language models (information conflicts, Appendix A.3): both are the lab's own.
    The layers are all whose output the final norm has not changed. As for β: maps have length 1, so L layers of a row
    of T tokens are at most 2 L / T apart, and in fact far less, for fine-tuning turns a map by some percent. Over the
    small model's recovery the distance is 2.9e-5 beside a CE of 0.08, and β = 3000 makes both of one order. For another
    model, the CE divided by the `map_distance` of a run tells its β.

    Args:
        access: what may be edited; its `recover` budget is used.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows, of teacher and student.
        folder: the purified adapter or model goes to `model` in it, the teacher to `teacher/model`.
        beta: β ≥ 0, the same for all layers.

    Returns:
        the record of `recover`, whose loss holds the weighted term; `map_distance`, the mean of the term over the
        steps; and the record of the `teacher`.
    """
    taught = finetuning(access, suspicious, defender, prompt_format, seed, Path(folder) / "teacher")
    terms: list[float] = []
    teacher = access.load(Path(folder) / "teacher" / "model")
    trainer = partial(DistillingTrainer, weight=beta, teacher=teacher, terms=terms)
    record = recover(access, suspicious, defender.recovery, prompt_format, seed, Path(folder) / "model", trainer)
    return told(record, "map_distance", terms) | {"teacher": taught}
