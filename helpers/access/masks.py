"""Masks of channels and heads, checked against the matrices they are meant for."""

from collections.abc import Mapping

from torch import BoolTensor
from transformers import PretrainedConfig

from helpers.core.errors import LabError
from helpers.model.architecture import head_masks, matrices

Masks = Mapping[str, BoolTensor]


def with_heads(masks: Masks, config: PretrainedConfig, heads: BoolTensor | None) -> dict[str, BoolTensor]:
    """The masks of channels and those of the heads' slices in the attention matrices, together.

    Args:
        masks: {module: [channels], True = suppressed}.
        config: of the model that they are meant for.
        heads: [n_layers, n_heads], True = suppressed.

    Raises:
        LabError: a mask of a matrix that the model does not have.
    """
    unknown = masks.keys() - matrices(config).keys()
    if unknown:
        raise LabError(f"no such matrix in this model: {', '.join(sorted(unknown))}")
    if heads is None:
        return dict(masks)
    return dict(masks) | {module: mask for module, mask in head_masks(config, heads).items() if mask.any()}


def check_length(module: str, mask: BoolTensor, channels: int) -> None:
    """Refuse a mask that has not one place for each channel of its matrix."""
    if len(mask) != channels:
        raise LabError(f"the mask of {module} has {len(mask)} channels, the matrix {channels}: scored another model?")
