"""Two attackers who know the defenses, one for each paper, and plant the backdoor so that it should survive.

They know a method and all its numbers, but not what a defender draws for himself: keys, payloads, rows and seeds. So
each plays the defender with his own. `subtract` (information conflicts, §6.3) takes a conflict model off the backdoored
one: what a defender merges in then only fills the gap. `evade` finds the channels that a backdoor signature (BD-VAX,
§4.2) would select and plants the backdoor again, paying for every change inside them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peft import PeftModel

from helpers.access import Access, access_to
from helpers.attacks.behaviors import behavior
from helpers.core.errors import LabError
from helpers.core.profile import Conflict
from helpers.data.own_backdoors import vaccine_behaviors, vaccine_keys
from helpers.defenses.bdvax.score import score_heads, score_mlp
from helpers.defenses.bdvax.select import select, select_heads
from helpers.defenses.bdvax.vaccines import SMALLEST_CLEAN_SET, Variant, paired, train_variants
from helpers.defenses.conflict.conflict_model import train_conflict
from helpers.model.adapters import PREFIX
from helpers.model.architecture import ROWS, head_masks, matrices
from helpers.model.checkpoint import load_config
from helpers.train.finetune import AnswerTrainer

if TYPE_CHECKING:
    from torch import BoolTensor

    from helpers.access.masks import Masks
    from helpers.defenses.bdvax.vaccines import Pair
    from helpers.model.prompt import PromptFormat


def subtract(plant, profile, access, attack, prompt_format, seed, folder):
    """Write θ̃ − μ (θ̂′ − θ₀), the backdoored model less an own conflict model's task vector.

    Implements the adaptive attack of information conflicts, §6.3 and Table 7. θ̂′ is trained from the base with the
    numbers of the defender's conflict model, on clean rows of the attacker's. With adapter access the difference is one
    adapter of twice the rank; with full access the weights themselves are changed.

    Args:
        plant: trains the backdoored model as usual, from the base, and writes it to the folder it is given.
        profile: `core.profile.Profile`; reads `conflict.budget` and μ, `adaptive.strength`.
        access: "adapter" or "full".
        attack: the attacker's rows; of the defender's none is read.
        seed: of the run; the attacker's own one is made from it.
        folder: to write the adapter or model to.

    Returns:
        the training record of `plant`, and that of the conflict model as `conflict`.

    Raises:
        LabError: several processes.

    Differs from the paper: it names neither the rows of the attacker's conflict model nor how much of it is taken off.
    """
    _require_one_process("subtract")
    strength, budget = profile.adaptive.strength, profile.conflict.budget
    expected = profile.model_copy(update={"conflict": Conflict(budget=budget, start="base")})
    rows = _rng(seed).sample(attack.clean, min(budget.rows, len(attack.clean)))
    with TemporaryDirectory() as scratch:
        backdoored, conflict = Path(scratch) / "backdoored", Path(scratch) / "conflict"
        record = plant(backdoored)
        opinion = train_conflict(expected, backdoored, rows, prompt_format, own_seed(seed), conflict)
        access_to(profile, access).add_update(backdoored, conflict, -strength, folder)
    return record | {"conflict": opinion}


def evade(plant, profile, access, attack, prompt_format, seed, folder):
    """Plant the backdoor outside of the channels that a signature would select, and write the adapter or model.

    The backdoor is planted once as usual, found as a defender would find it, and planted anew from the base with
    `adaptive.penalty` · ‖ΔW‖² over the selected channels and heads added to the loss. What was selected is written
    nowhere.

    Args:
        plant: as in `subtract`; also takes a `new_trainer`, see `finetune`.
        profile: `core.profile.Profile`; reads `signature`, and `vaccine` and `suppress` of the access setting.
        access, attack, prompt_format, seed, folder: as in `subtract`.

    Returns:
        the record of the second training, whose loss holds the penalty, and `share_inside`: the share of the update's
        squared length inside the selected channels, `before` and `after` (see `share_inside`).

    Raises:
        LabError: several processes, or too few clean rows for the rehearsal.
    """
    _require_one_process("evade")
    edited = access_to(profile, access)
    pairs = rehearsal_pairs(attack, profile.signature, edited.settings.vaccine.rows, seed)
    with TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        plant(first)
        masks = rehearse(edited, first, pairs, prompt_format, own_seed(seed), Path(scratch) / "variants")
        before = share_inside(edited, first, masks)
    record = plant(folder, new_trainer=partial(EvadingTrainer, masks=masks, penalty=profile.adaptive.penalty))
    after = share_inside(edited, folder, masks)
    return record | {"share_inside": {"before": round(before, 6), "after": round(after, 6)}}


ADAPTIVE = {"subtract": subtract, "evade": evade}


def own_seed(seed):
    """A seed of the attacker's own: no number that a defender counts up from the run's seed."""
    return _rng(seed).getrandbits(31)


def rehearsal_pairs(attack, signature, rows, seed):
    """Return what `vaccine_pairs` does for an attacker who plays the defender on his own model.

    Keys and payloads are the attacker's own (`rehearsal` of `data/attacks.yaml`), and so are the rows, disjoint parts
    of `attack.clean`: nothing of the defender's is read. There are N pairs, at most one for each key.

    Args:
        rows: the size of a clean set, where there are enough for all.

    Raises:
        LabError: too few rows for so many pairs.
    """
    keys = vaccine_keys("rehearsal")[: signature.n]
    planted = vaccine_behaviors(signature.family, behavior(attack.task).vaccines, "rehearsal")
    size = min(rows, len(attack.clean) // len(keys))
    if size < SMALLEST_CLEAN_SET:
        raise LabError(
            f"the attacker's {len(attack.clean)} clean rows give {len(keys)} rehearsed variants {size} each, and "
            f"{SMALLEST_CLEAN_SET} are needed: set inject.rows higher or signature.n lower"
        )
    pool = random.Random(f"{seed}/rehearsal").sample(attack.clean, size * len(keys))
    sets = [pool[i * size : (i + 1) * size] for i in range(len(keys))]
    return paired(keys, planted, sets, f"{seed}/rehearsal")


def rehearse(
    access: Access,
    suspicious: Path | str,
    pairs: Sequence[Pair],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path,
) -> dict[str, BoolTensor]:
    """Vaccinate a model, score its channels and return those that a defender would suppress (BD-VAX §4.2).

    Args:
        access: as in `train_variants`; `signature` says how to score, `suppress` how much to select.
        suspicious: folder of the adapter or model.
        pairs: (key, payload, clean rows, poisoned rows) of each variant.
        prompt_format: the one that the model was trained in.
        seed: of the first pair; the others count up from it.
        folder: for the variants.

    Returns:
        {module: mask [channels]} of the matrices with selected channels, those of selected heads among them.

    Raises:
        LabError: a share so small that nothing is selected.
    """
    members = {"poisoned": [], "clean": []}
    for i, (_, _, clean, poisoned) in enumerate(pairs):
        members["poisoned"].append(Variant(clean + poisoned, seed + i, folder / f"{i}-poisoned"))
        members["clean"].append(Variant(clean, seed + i, folder / f"{i}-clean"))
    train_variants(access, suspicious, members["poisoned"] + members["clean"], prompt_format)
    gram_of = access.variant_pairs(*([variant.folder for variant in variants] for variants in members.values()))
    profile, suppress = access.profile, access.settings.suppress
    signature, config = profile.signature, load_config(profile.model)
    masks = select(score_mlp(gram_of, config, signature), suppress.tau, signature.scope)
    if suppress.heads:
        heads = select_heads(score_heads(gram_of, config, signature), suppress.heads, suppress.heads_of)
        masks |= head_masks(config, heads)
    chosen = {module: mask for module, mask in masks.items() if mask.any()}
    if not chosen:
        raise LabError(f"suppress.tau = {suppress.tau} selects no channel of this model, so there is nothing to avoid")
    return chosen


class EvadingTrainer(AnswerTrainer):
    """The Trainer of `finetune`, with penalty · ‖ΔW‖² over selected channels added to the loss.

    Args:
        masks: {module: mask [channels], True = change costs}.
        penalty: per squared unit of weight.
    """

    def __init__(self, *args, masks, penalty, **options):
        super().__init__(*args, **options)
        self.penalty, self.inside = penalty, squared_update(self.model, masks)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss per answer token plus the penalty, which does not depend on the batch."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.penalty * self.inside()
        return (loss, outputs) if return_outputs else loss


def squared_update(model, masks):
    """Return a function that tells ‖ΔW‖² over the selected channels of all matrices, as a tensor with a gradient.

    Args:
        model: a PEFT model, whose LoRA product is ΔW, or a full one: then ΔW counts from the weights as they are now.
        masks: as in `EvadingTrainer`.
    """
    slots, parts = matrices(model.config), []
    for module, mask in masks.items():
        if isinstance(model, PeftModel):
            parts.append(partial(_lora_square, model.get_submodule(PREFIX + module), mask, slots[module].side))
            continue
        weight, axis = model.get_submodule(module).weight, slots[module].axis
        parts.append(partial(_square, weight, _channels(weight, mask, axis).detach().clone(), mask, axis))
    return lambda: sum(part() for part in parts)


def share_inside(access: Access, folder: Path | str, masks: Masks) -> float:
    """Return how much of an attack's update lies in the selected channels: its share of the squared length, 0 to 1.

    Only matrices with a mask count; a penalty moves the update from inside to outside of the mask.

    Args:
        access: what the attack has edited.
        folder: of the attacked adapter or model.
        masks: as in `EvadingTrainer`.
    """
    slots, gram_of = matrices(load_config(access.profile.model)), access.own_update(folder)
    squares = {module: gram_of(slots[module])[0, 0] for module in masks}  # [channels]
    inside = sum(float(squares[module][mask].sum()) for module, mask in masks.items())
    return inside / sum(float(square.sum()) for square in squares.values())


def _lora_square(layer, mask, side):
    """‖s B A‖² = s² ⟨Bᵀ B, A Aᵀ⟩ over rows of B or columns of A: two r × r matrices instead of the whole update."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up, down = (_channels(up, mask, side), down) if side == ROWS else (up, _channels(down, mask, side))
    return layer.scaling["default"] ** 2 * ((up.mT @ up) * (down @ down.mT)).sum()


def _square(weight, start, mask, axis):
    return (_channels(weight, mask, axis).float() - start.float()).square().sum()


def _channels(weight, mask, axis):
    """The selected rows (axis 0) or columns (axis 1) of a matrix."""
    return weight.index_select(axis, mask.nonzero().flatten().to(weight.device))


def _rng(seed):
    return random.Random(f"{seed}/adaptive")


def _require_one_process(by):
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError(f"attack.by = '{by}' trains several models one after the other: run it in one process")
