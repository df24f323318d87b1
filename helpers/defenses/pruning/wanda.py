"""Wanda (Sun et al. 2024): a weight matters as much as it is large and as its input is loud, |W_ij| · ‖X_j‖₂.

A backdoor's inputs are quiet on clean rows, so its weights look as if they could go.
"""

from collections.abc import Sequence

import torch
from torch import BoolTensor, Tensor
from transformers import PreTrainedModel

from helpers.defenses.bdvax.score import Scores
from helpers.defenses.pruning.activations import Inputs, input_norms
from helpers.defenses.pruning.blocks import layer_matrices, oriented
from helpers.model.architecture import head_slots, matrices, mlp_slots


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂. Implements Eq. (1) of Wanda, §3.

    Args:
        weight: W [out, in].
        norms: ‖X_j‖₂ [in], >= 0.

    Returns:
        [out, in], >= 0, float32.
    """
    return weight.float().abs() * norms.float()


def lowest_in_rows(scores: Tensor, share: float) -> BoolTensor:
    """The round(share · in) lowest scores of each output row; of equal scores the first.

    Args:
        scores: [out, in].
        share: in (0, 1).

    Returns:
        mask [out, in], True = lowest.
    """
    lowest = scores.argsort(dim=1, stable=True)[:, : round(share * scores.shape[1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


@torch.no_grad()
def prune_by_wanda(model: PreTrainedModel, batches: Sequence[Inputs], share: float) -> None:
    """Zero the least important weights of every output row, in place, one layer after the other (Wanda, §3).

    What enters a layer is measured behind those that are pruned already, as it will be when the model runs.

    Args:
        model: in evaluation mode.
        batches: of `clean_batches`.
        share: of each row, in (0, 1).
    """
    for layer in layer_matrices(model.config):
        norms = input_norms(model, batches, [slot.module for slot in layer])
        for slot in layer:
            weight = oriented(model, slot)
            weight.masked_fill_(lowest_in_rows(wanda_scores(weight, norms[slot.module]), share), 0)


@torch.no_grad()
def dormant_rankings(model: PreTrainedModel, batches: Sequence[Inputs]) -> tuple[Scores, Tensor]:
    """Rank MLP neurons and attention heads by how little they matter on clean rows.

    A neuron's importance is the sum of the Wanda scores of its row of `gate_proj` and `up_proj` and of its column of
    `down_proj`; a head's is that of its rows of q, k and v and its columns of o.

    Args:
        model: in evaluation mode.
        batches: of `clean_batches`; read once, by the model as it is.

    Returns:
        {module: [channels]}, the same for all matrices of a layer, and [n_layers, n_heads]; minus the importance,
        <= 0, float64, on the CPU.
    """
    slots = matrices(model.config)
    norms = input_norms(model, batches, slots)
    sums = {
        module: wanda_scores(oriented(model, slot), norms[module]).double().sum(1 - slot.side).cpu()
        for module, slot in slots.items()
    }
    channels = {}
    for layer in mlp_slots(model.config):
        channels |= dict.fromkeys((slot.module for slot in layer), -sum(sums[slot.module] for slot in layer))
    heads = [
        [-sum(float(sums[part.module][part.start : part.stop].sum()) for part in head) for head in layer]
        for layer in head_slots(model.config)
    ]
    return channels, torch.tensor(heads, dtype=torch.float64)
