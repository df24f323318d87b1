"""Magnitude: what is small is taken to matter little. No data is needed."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import prune
from transformers import PreTrainedModel

from helpers.access import Access
from helpers.access.deltas import slot_gram
from helpers.core.errors import LabError
from helpers.defenses.bdvax.score import Scores, blank_rankings, magnitude_scores, score_heads
from helpers.model.architecture import matrices, mlp_slots
from helpers.model.checkpoint import load_config


def smallest_rankings(access: Access, suspicious: Path | str) -> tuple[Scores, Tensor]:
    """Rank channels and heads by how small they are, in the adapter's update or in the model's weights.

    Args:
        access: says which of the two is edited; heads are ranked only where its numbers suppress any.
        suspicious: folder of the adapter or model.

    Returns:
        {module: [channels]} and [n_layers, n_heads]; minus the length, <= 0, float64.

    Raises:
        LabError: an adapter that leaves out a matrix.
    """
    config, signature = load_config(access.profile.model), access.profile.signature
    weights, heads = access.edited_matrices(suspicious), blank_rankings(config)[1]
    slots = mlp_slots(config)
    ranked = matrices(config) if access.settings.suppress.heads else [s.module for layer in slots for s in layer]
    if missing := [module for module in ranked if module not in weights]:
        raise LabError(f"the adapter in {suspicious} has no LoRA on {missing[0]}, so it ranks nothing: use ACCESS=full")
    if access.settings.suppress.heads:
        norm_only = signature.model_copy(update={"combine": "norm"})
        heads = -score_heads(lambda slot: slot_gram(weights[slot.module], slot), config, norm_only)
    return magnitude_scores(weights, slots, signature.granularity), heads


@torch.no_grad()
def prune_smallest(model: PreTrainedModel, share: float) -> None:
    """Zero the smallest weights of every matrix inside the layers, in place.

    Args:
        model: a whole one.
        share: of each matrix, in (0, 1).
    """
    for module in map(model.get_submodule, matrices(model.config)):
        prune.l1_unstructured(module, "weight", amount=share)
        prune.remove(module, "weight")
