"""Evading a backdoor signature (BD-VAX, §4.2): every change is paid for in the channels that it would select."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.adaptive.evasion import EvadingTrainer, rehearsal_pairs, rehearse, share_inside
from helpers.adaptive.seeds import own_seed
from helpers.attacks.methods.training import training
from helpers.attacks.registry import Record, method
from helpers.core.profile import Profile
from helpers.data.roles import AttackData
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import finetune


@method(one_process=True)
def evade(
    profile: Profile, access: str, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str
) -> Record:
    """Plant the backdoor outside of the channels that a signature would select, and write the adapter or model.

    The backdoor is planted once as usual, found as a defender would find it, and planted anew from the base with
    `adaptive.penalty` · ‖ΔW‖² over the selected channels and heads added to the loss. What was selected is written
    nowhere.

    Args:
        profile: reads `signature`, `adaptive.penalty`, and `vaccine` and `suppress` of the access setting.
        access, attack, prompt_format, seed, folder: as in `subtract`.

    Returns:
        the record of the second training, whose loss holds the penalty, and `share_inside`: the share of the update's
        squared length inside the selected channels, `before` and `after` (see `share_inside`).

    Raises:
        LabError: too few clean rows for the rehearsal.
    """
    pairs = rehearsal_pairs(attack, profile.signature, profile.access(access).vaccine.rows, seed)
    plant = partial(training, profile, access, attack, prompt_format, seed)
    with TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        plant(first)
        masks = rehearse(profile, access, first, pairs, prompt_format, own_seed(seed), Path(scratch) / "variants")
        before = share_inside(profile, access, first, masks)
    evading = partial(EvadingTrainer, masks=masks, penalty=profile.adaptive.penalty)
    record = plant(folder, train=partial(finetune, new_trainer=evading))
    after = share_inside(profile, access, folder, masks)
    return record | {"share_inside": {"before": round(before, 6), "after": round(after, 6)}}
