"""What evading a signature takes: a rehearsal of the defense, and a penalty on every change that it would see."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import BoolTensor, Tensor, nn
from transformers import PreTrainedModel

from helpers.access import Access
from helpers.access.masks import Masks
from helpers.attacks.behaviors import behavior
from helpers.core.errors import LabError
from helpers.core.profile import Signature
from helpers.data.own_backdoors import vaccine_behaviors, vaccine_keys
from helpers.data.planting import Trigger
from helpers.data.roles import SMALLEST_CLEAN_SET, AttackData
from helpers.defenses.bdvax.score import score_heads, score_mlp
from helpers.defenses.bdvax.select import select_suppressed
from helpers.defenses.bdvax.vaccines import Pair, paired, plan_variants, train_variants, variant_folders
from helpers.model.adapters import PREFIX
from helpers.model.architecture import ROWS, head_masks, matrices
from helpers.model.checkpoint import load_config
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import AnswerTrainer


def rehearsal_pairs(attack: AttackData, signature: Signature, rows: int, seed: int) -> list[Pair]:
    """Return what `vaccine_pairs` does for an attacker who plays the defender on his own model.

    Keys and payloads are the attacker's own (`rehearsal` of `data/attacks.yaml`), and so are the rows, disjoint parts
    of `attack.clean`: nothing of the defender's is read. There are N pairs, at most one for each key. Each trigger is
    one key at a random place, whatever form the vaccines' have.

    Args:
        rows: the size of a clean set, where there are enough for all.

    Raises:
        LabError: too few rows for so many pairs.
    """
    triggers = [Trigger(name=key, keys=(key,)) for key in vaccine_keys("rehearsal")[: signature.n]]
    planted = vaccine_behaviors(signature.family, behavior(attack.task).vaccines, "rehearsal")
    size = min(rows, len(attack.clean) // len(triggers))
    if size < SMALLEST_CLEAN_SET:
        raise LabError(
            f"the attacker's {len(attack.clean)} clean rows give {len(triggers)} rehearsed variants {size} each, and "
            f"{SMALLEST_CLEAN_SET} are needed: set inject.rows higher or signature.n lower"
        )
    pool = random.Random(f"{seed}/rehearsal").sample(attack.clean, size * len(triggers))
    sets = [pool[i * size : (i + 1) * size] for i in range(len(triggers))]
    return paired(triggers, planted, sets, f"{seed}/rehearsal")


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
    train_variants(access, suspicious, plan_variants(pairs, seed, folder), prompt_format)
    gram_of = access.variant_pairs(*variant_folders(folder, len(pairs)))
    signature, config = access.profile.signature, load_config(access.profile.model)
    channels, heads = score_mlp(gram_of, config, signature), score_heads(gram_of, config, signature)
    masks, chosen_heads = select_suppressed(access, channels, heads)
    masks |= head_masks(config, chosen_heads)
    chosen = {module: mask for module, mask in masks.items() if mask.any()}
    if not chosen:
        tau = access.settings.suppress.tau
        raise LabError(f"suppress.tau = {tau} selects no channel of this model, so there is nothing to avoid")
    return chosen


class EvadingTrainer(AnswerTrainer):
    """The Trainer of `finetune`, with penalty · ‖ΔW‖² over selected channels added to the loss.

    Args:
        masks: {module: mask [channels], True = change costs}.
        penalty: per squared unit of weight.
    """

    def __init__(self, *args: Any, masks: Masks, penalty: float, **options: Any):
        super().__init__(*args, **options)
        self.penalty, self.inside = penalty, squared_update(self.model, masks)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss per answer token plus the penalty, which does not depend on the batch."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.penalty * self.inside()
        return (loss, outputs) if return_outputs else loss


def squared_update(model: PeftModel | PreTrainedModel, masks: Mapping[str, Tensor]) -> Callable[[], Tensor]:
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
