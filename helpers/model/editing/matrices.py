"""The matrices that an edit rewrites, and ROME's rank-one update of one of them in a running model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel

from helpers.core.errors import LabError
from helpers.model.architecture import COLUMNS, Slot, mlp_slots, parameter_shapes
from helpers.model.editing.activations import Batch, ValueSearch, keys_at, layer_of, search_shifts
from helpers.model.editing.updates import rank_one_update


def editable_slots(config: PretrainedConfig, layers: Sequence[int], setting: str = "editing.layers") -> list[Slot]:
    """The matrices that an edit of `layers` rewrites: the output projection of each one's MLP.

    Args:
        layers: ascending numbers, from 0.
        setting: what errors call them.

    Raises:
        LabError: layers that are not ascending or not there, or a norm between MLP and residual stream.
    """
    every = [layer[-1] for layer in mlp_slots(config)]
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(every):
        raise LabError(f"{setting} = {layers} should be ascending numbers from 0 to {len(every) - 1}")
    slots = [every[layer] for layer in layers]
    if f"{layer_of(slots[0])}.post_feedforward_layernorm.weight" in parameter_shapes(config):
        raise LabError(
            f"in a {config.model_type} a norm stands behind each MLP, so no shift of its output reaches the "
            "residual stream as it is: edit a model without one"
        )
    return slots


def weight_of(model: PreTrainedModel, slot: Slot) -> Parameter:
    """The weight of a matrix, as it is stored."""
    return model.get_submodule(slot.module).weight


@torch.no_grad()
def add_update(model: PreTrainedModel, slot: Slot, update: Tensor) -> None:
    """Add Δ [out, in] to an output projection; where channels are rows, as in GPT-2, it is stored as its transpose."""
    weight = weight_of(model, slot)
    weight += (update if slot.axis == COLUMNS else update.T).to(weight)


def store_at_mean_key(
    model: PreTrainedModel, batch: Batch, slot: Slot, moment: Tensor, search: ValueSearch
) -> tuple[Tensor, float]:
    """Give the mean key of a batch the one shift that serves all its answers best. Implements Eq. (2) of ROME.

    Args:
        model: edited in place.
        batch: prompts with their answers and sites.
        slot: the matrix to edit.
        moment: C of its keys [in, in].
        search: how the shift is searched for.

    Returns:
        δ [1, d], and the mean of −log P(answer token) that it reaches where it is added at the sites themselves.
    """
    shift, loss = search_shifts(model, batch, slot, search, shared=True)
    key = keys_at(model, batch, slot).mean(dim=0)
    add_update(model, slot, rank_one_update(shift[0], key, moment))
    return shift, loss
