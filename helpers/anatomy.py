"""Which numbers of a checkpoint form one MLP channel, or one attention head.

A gated MLP computes down(silu(gate(x)) * up(x)). Channel j exists in three places: row j of gate_proj, row j of
up_proj, column j of down_proj; without them the block computes the same function without that one activation.
A head is likewise its rows of q_proj, k_proj and v_proj and its columns of o_proj. With grouped-query attention
several query heads read one key/value head, whose rows may only go when all of its readers go.
"""

from dataclasses import dataclass

import torch
from torch import BoolTensor
from transformers import AutoModel, PretrainedConfig

from helpers.profiles import LabError

ARCHITECTURES = ("llama", "mistral", "qwen2")
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Slot:
    """A weight matrix [out, in] and the axis that counts its channels: 0 for rows (outputs), 1 for columns (inputs)."""

    module: str
    axis: int


@dataclass(frozen=True)
class HeadSlot(Slot):
    """The part [start, stop) of a matrix's channels that belongs to one attention head."""

    start: int
    stop: int


def mlp_slots(config: PretrainedConfig) -> list[list[Slot]]:
    """The three matrices of each layer's MLP: gate and up by rows, down by columns.

    Returns: per layer [gate, up, down]; channel j of all three is the same MLP channel, j < d_ff.
    Raises: LabError for an architecture whose MLP has other parts.
    """
    return _slots(config, "mlp", {"gate_proj": ROWS, "up_proj": ROWS, "down_proj": COLUMNS})


def attention_slots(config: PretrainedConfig) -> list[list[Slot]]:
    """The four matrices of each layer's attention: q, k and v by rows, o by columns.

    Returns: per layer [q, k, v, o]; q and o have n_heads * head_dim channels, k and v n_kv_heads * head_dim.
    Raises: LabError for an architecture whose attention has other parts.
    """
    return _slots(config, "self_attn", {"q_proj": ROWS, "k_proj": ROWS, "v_proj": ROWS, "o_proj": COLUMNS})


def head_slots(config: PretrainedConfig) -> list[list[list[HeadSlot]]]:
    """Each query head's share of its layer's attention; query heads of one group share k and v.

    Returns: [layer][head] -> [q, k, v, o] with the head's channel range in each.
    Raises: LabError for an architecture whose attention has other parts.
    """
    heads = range(config.num_attention_heads)
    return [[[_head_slot(config, slot, head) for slot in layer] for head in heads] for layer in attention_slots(config)]


def head_masks(config: PretrainedConfig, heads: BoolTensor) -> dict[str, BoolTensor]:
    """The channels that go when these heads go; k and v rows only where every query head of the group goes.

    Args: heads [n_layers, n_heads], True = selected.
    Returns: {module: mask [channels]} for the four attention matrices of each layer.
    Raises: LabError when `heads` has another shape than the model.
    """
    expected = (config.num_hidden_layers, config.num_attention_heads)
    if tuple(heads.shape) != expected:
        raise LabError(f"head mask has shape {list(heads.shape)}, the model [layers, heads] = {list(expected)}")
    masks = {}
    for layer, chosen in zip(attention_slots(config), heads, strict=True):
        query = chosen.repeat_interleave(_head_dim(config))
        shared = chosen.view(_kv_heads(config), -1).all(dim=1).repeat_interleave(_head_dim(config))
        masks |= {slot.module: shared if _is_shared(slot) else query for slot in layer}
    return masks


def channel_axes(config: PretrainedConfig) -> dict[str, int]:
    """The axis that counts channels, for each matrix of each layer's MLP and attention."""
    return {slot.module: slot.axis for layer in mlp_slots(config) + attention_slots(config) for slot in layer}


def _slots(config: PretrainedConfig, block: str, axes: dict[str, int]) -> list[list[Slot]]:
    if config.model_type not in ARCHITECTURES:
        found = ", ".join(_matrix_names(config))
        raise LabError(
            f"architecture '{config.model_type}' is not supported (supported: {', '.join(ARCHITECTURES)}): "
            f"expected {', '.join(axes)} in each layer's {block}, found {found}"
        )
    prefixes = [f"model.layers.{layer}.{block}" for layer in range(config.num_hidden_layers)]
    return [[Slot(f"{prefix}.{name}", axis) for name, axis in axes.items()] for prefix in prefixes]


def _matrix_names(config: PretrainedConfig) -> list[str]:
    """Last names of all weight matrices, from a model without storage."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    names = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})


def _head_slot(config: PretrainedConfig, slot: Slot, head: int) -> HeadSlot:
    readers = config.num_attention_heads // _kv_heads(config)
    index = head // readers if _is_shared(slot) else head
    size = _head_dim(config)
    return HeadSlot(slot.module, slot.axis, index * size, (index + 1) * size)


def _is_shared(slot: Slot) -> bool:
    return slot.module.endswith(("k_proj", "v_proj"))


def _kv_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
