"""The last hidden layer: the numbers of each token from which the head makes logits."""

from collections.abc import Sequence

import torch
from torch import BoolTensor, Tensor, nn
from transformers import PreTrainedModel

from helpers.defenses.pruning.activations import Inputs, require_finite_activations
from helpers.model.architecture import final_norm


@torch.no_grad()
def mean_activations(model: PreTrainedModel, batches: Sequence[Inputs]) -> Tensor:
    """The mean of |h_j| over all tokens of clean rows, h the last hidden state, behind the last norm.

    Args:
        model: in evaluation mode.
        batches: of `clean_batches`.

    Returns:
        [width], float64.

    Raises:
        LabError: as `require_finite_activations`.
    """
    total, tokens = 0.0, 0
    for inputs in batches:
        real = inputs["attention_mask"].bool()
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        total, tokens = total + states[real].float().abs().sum(0).double(), tokens + int(real.sum())
    require_finite_activations(total, "the last hidden state")
    return total / tokens


def quietest(activations: Tensor, share: float) -> BoolTensor:
    """The round(share · width) channels of lowest activation; of equal ones the first.

    Args:
        activations: [width].
        share: in (0, 1).
    """
    mask = torch.zeros_like(activations, dtype=torch.bool)
    mask[activations.argsort(stable=True)[: round(share * len(activations))]] = True
    return mask


@torch.no_grad()
def silence(model: PreTrainedModel, channels: BoolTensor) -> None:
    """Make channels of the last hidden state 0 for every token, for good: no training moves the last norm any more.

    Args:
        model: in place.
        channels: [width], True = silenced.
    """
    norm = final_norm(model)
    norm.weight.masked_fill_(channels, _no_gain(norm))
    if getattr(norm, "bias", None) is not None:
        norm.bias.masked_fill_(channels, 0)
    norm.requires_grad_(False)


def _no_gain(norm: nn.Module) -> float:
    """The stored gain by which a norm multiplies by 0: Gemma's norms store how far theirs lies from 1."""
    return -1.0 if type(norm).__name__.startswith("Gemma") else 0.0
