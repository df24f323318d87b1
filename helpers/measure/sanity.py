"""Sanity checks: does the backdoor still fire without parts of the poisoned update ΔW? (BD-VAX §4.1, Table 1)

ΔW is the difference of the suspicious model and its base, both known here because the lab planted the backdoor itself.
Ablating a part means giving its weights their clean values back; nothing is trained.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from helpers.model.architecture import attention_slots, mlp_slots, parameter_shapes


def mlp_weights(config: PretrainedConfig, layers: Iterable[int] | None = None) -> list[str]:
    """Names of the MLP weights, and biases where there are some, of the given layers (all by default).

    Raises:
        LabError: an architecture that the lab does not know.
    """
    return _weights(config, mlp_slots(config), layers)


def attention_weights(config: PretrainedConfig, layers: Iterable[int] | None = None) -> list[str]:
    """Names of the attention projections' weights, and biases where there are some, of the given layers.

    Raises:
        LabError: an architecture that the lab does not know.
    """
    return _weights(config, attention_slots(config), layers)


def _weights(config, slots, layers):
    chosen, known = range(len(slots)) if layers is None else layers, parameter_shapes(config)
    modules = dict.fromkeys(slot.module for layer in chosen for slot in slots[layer])  # q, k and v may be one
    names = (f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
    return [name for name in names if name in known]


@torch.no_grad()
def without_update(suspicious: PreTrainedModel, base: PreTrainedModel, names: Iterable[str]) -> PreTrainedModel:
    """Return a copy of `suspicious` whose parameters `names` have the values of `base`: ΔW = 0 there.

    Args:
        suspicious, base: models of one architecture.
        names: parameter names; see `mlp_weights` and `attention_weights`.
    """
    model, clean = copy.deepcopy(suspicious), dict(base.named_parameters())
    for name in names:
        model.get_parameter(name).copy_(clean[name])
    return model


@torch.no_grad()
def with_shuffled_mlp_updates(
    suspicious: PreTrainedModel, base: PreTrainedModel, order: Sequence[int]
) -> PreTrainedModel:
    """Return a copy of `suspicious` in which block l carries the MLP update of block `order[l]`.

    Args:
        suspicious, base: models of one architecture.
        order: a permutation of the layers.
    """
    model, clean, source = copy.deepcopy(suspicious), dict(base.named_parameters()), dict(suspicious.named_parameters())
    layers = [mlp_weights(model.config, [layer]) for layer in range(len(order))]
    for names, donor in zip(layers, order, strict=True):
        for here, there in zip(names, layers[donor], strict=True):
            model.get_parameter(here).copy_(clean[here] + (source[there] - clean[there]))
    return model


def spans(n_layers: int) -> Iterator[tuple[str, int, list[int]]]:
    """All spans of k consecutive blocks of Table 1: at the start, in the middle and at the end for every k.

    Yields:
        (position, k, the k layers, counted from 0).
    """
    for k in range(1, n_layers + 1):
        middle = (n_layers - k) // 2
        for position, first in (("start", 0), ("middle", middle), ("end", n_layers - k)):
            yield position, k, list(range(first, first + k))
