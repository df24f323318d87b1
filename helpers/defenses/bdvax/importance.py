"""Sparing what clean rows need: a ranking of suspicious channels, joined with how much the model uses each of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from helpers.access import Access
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.defenses.bdvax.score import Scores
from helpers.defenses.pruning.activations import clean_batches, input_norms
from helpers.model.architecture import Slot, mlp_slots
from helpers.model.prompt import PromptFormat


def activation_importance(
    model: PreTrainedModel, rows: Sequence[Example], prompt_format: PromptFormat, profile: Profile
) -> Scores:
    """How much every MLP channel writes on clean rows: the length of its activations times that of its column.

    Wanda's |W| · ‖X‖₂ (Sun et al. 2024) over a whole column of the output projection instead of a single weight.

    Args:
        model: as a user runs it.
        rows: clean examples; their prompts and right answers are read, and padding does not count.
        prompt_format: the one that evaluation uses, too.
        profile: how long rows may be, and how many are read at once.

    Returns:
        {module: [channels]}, >= 0, float64, on the CPU; one importance for all matrices of a channel.

    Raises:
        LabError: a row that the model has no positions for, or activations that are not finite.
    """
    layers = mlp_slots(model.config)
    written = [layer[-1] for layer in layers]  # the slots of `down_proj`
    norms = input_norms(model, clean_batches(model, rows, prompt_format, profile), [slot.module for slot in written])
    importance = [(norms[slot.module] * _lengths(model, slot)).cpu() for slot in written]
    return {slot.module: one for layer, one in zip(layers, importance, strict=True) for slot in layer}


def spare_important(scores: Scores, importance: Scores, weight: float, scope: str) -> Scores:
    """The rank of each channel's score less `weight` times the rank of its importance.

    Args:
        scores, importance: {module: [channels]}, higher = more suspicious, more important.
        weight: >= 0; 0 leaves the order of the scores.
        scope: "module" ranks inside each matrix, "model" over all of them together, as `select` does.

    Returns:
        {module: [channels]}, float64, between -weight and 1; equal values share their mean rank.
    """
    suspicious, important = _ranks(scores, scope), _ranks({module: importance[module] for module in scores}, scope)
    return {module: suspicious[module] - weight * important[module] for module in scores}


def without_important(
    access: Access,
    suspicious: Path | str,
    scores: Scores,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    weight: float,
) -> Scores:
    """A ranking joined with the importance of each channel in the suspicious model; see `spare_important`.

    Args:
        access: to the suspicious model.
        suspicious: folder of the suspicious adapter or model.
        scores: {module: [channels]}, the ranking.
        rows: clean examples to measure importance on.
        prompt_format: the one that evaluation uses, too.
        weight: of the importance; with 0 the ranking stays as it is and nothing is measured.
    """
    if not weight:
        return scores
    importance = activation_importance(access.load(suspicious), rows, prompt_format, access.profile)
    return spare_important(scores, importance, weight, access.profile.signature.scope)


def _lengths(model: PreTrainedModel, slot: Slot) -> Tensor:
    """The length of each channel's weights in a matrix."""
    weight = model.get_submodule(slot.module).weight.detach()
    return torch.linalg.vector_norm(weight.double(), dim=1 - slot.axis)


def _ranks(scores: Scores, scope: str) -> Scores:
    """Ranks in (0, 1], ascending."""
    if scope == "module":
        return {module: _ranked(values) for module, values in scores.items()}
    sizes = [len(values) for values in scores.values()]
    together = _ranked(torch.cat(list(scores.values())))
    return dict(zip(scores, together.split(sizes), strict=True))


def _ranked(values: Tensor) -> Tensor:
    return torch.from_numpy(rankdata(values.numpy())) / len(values)
