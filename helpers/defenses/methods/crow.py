"""CROW (Min et al. 2025): fine-tuning that also keeps neighbouring layers consistent under shifted embeddings."""

from functools import partial
from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import at_rate, recover
from helpers.defenses.registry import Record, defense
from helpers.defenses.regularizers.base import told
from helpers.defenses.regularizers.consistency import ConsistencyTrainer, require_neighbours
from helpers.model.checkpoint import load_config
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def crow(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    alpha: float = 5.5,
    epsilon: float = 0.1,
    lr: float | None = None,
) -> Record:
    """Fine-tune on the recovery rows with the loss CE + α · c(E + δ), δ = ε · sign(∂c/∂E).

    c is the mean of 1 − cos between the hidden states of neighbouring layers, see `inconsistency`. With α = 0 this is
    `finetuning`.

    Differs from the published code:
        gradients that parameters have gathered are left alone; padding is masked in the passes from the embeddings as
        well, and does not count; the rate is the recovery's, for the code's own of 1e-3 alone can look like a defense
        (BD-VAX, Appendix C.2). The code trains a LoRA adapter on 100 rows in batches of 8; here rows and batch are the
        recovery's, and with full access all weights train, for which 1e-3 was never published.

    Args:
        access: what may be edited; its `recover` budget is used.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows.
        folder: the purified adapter or model goes to `model` in it.
        alpha: α ≥ 0, what c weighs beside the loss per answer token; the paper's value.
        epsilon: ε > 0, what each number of an embedding moves by, whatever their scale (on the small model their root
            mean square is 0.12); the paper's value.
        lr: in the place of the recovery's learning rate; the published code's is 1e-3.

    Returns:
        the record of `recover`, whose loss holds α · c, and `inconsistency`, the mean of c(E + δ) over the steps.

    Raises:
        LabError: a model of fewer than three layers.
    """
    require_neighbours(load_config(access.profile.model))
    access = at_rate(access, lr)
    terms: list[float] = []
    trainer = partial(ConsistencyTrainer, weight=alpha, epsilon=epsilon, terms=terms)
    record = recover(access, suspicious, defender.recovery, prompt_format, seed, Path(folder) / "model", trainer)
    return told(record, "inconsistency", terms)
