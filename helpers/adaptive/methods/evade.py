"""Evading a backdoor signature (BD-VAX, §4.2): every change is paid for in the channels that it would select."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.access import Access
from helpers.adaptive.evasion import EvadingTrainer, rehearsal_pairs, rehearse, share_inside
from helpers.adaptive.seeds import own_seed
from helpers.attacks.methods.training import training
from helpers.attacks.registry import Record, method
from helpers.data.roles import AttackData
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import finetune


@method(one_process=True)
def evade(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Plant the backdoor outside of the channels that a signature would select, and write the adapter or model.

    The backdoor is planted once as usual, found as a defender would find it, and planted anew from the base with
    `adaptive.penalty` · ‖ΔW‖² over the selected channels and heads added to the loss. What was selected is written
    nowhere.

    Args:
        access: what is edited; `vaccine` and `suppress` are read, and of the profile `signature` and
            `adaptive.penalty`.
        attack, prompt_format, seed, folder: as in `subtract`.

    Returns:
        the record of the second training, whose loss holds the penalty, and `share_inside`: the share of the update's
        squared length inside the selected channels, `before` and `after` (see `share_inside`).

    Raises:
        LabError: too few clean rows for the rehearsal.
    """
    profile = access.profile
    pairs = rehearsal_pairs(attack, profile.signature, access.settings.vaccine.rows, seed)
    plant = partial(training, access, attack, prompt_format, seed)
    with TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        plant(first)
        masks = rehearse(access, first, pairs, prompt_format, own_seed(seed), Path(scratch) / "variants")
        before = share_inside(access, first, masks)
    evading = partial(EvadingTrainer, masks=masks, penalty=profile.adaptive.penalty)
    record = plant(folder, train=partial(finetune, new_trainer=evading))
    after = share_inside(access, folder, masks)
    return record | {"share_inside": {"before": round(before, 6), "after": round(after, 6)}}
