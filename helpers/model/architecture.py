"""Which numbers of a checkpoint form one MLP channel, or one attention head.

A gated MLP computes down(silu(gate(x)) * up(x)). Channel j exists in three places: row j of gate, row j of up, column
j of down; without them the block computes the same function without that one activation. Where there is no gate there
are two. A head is likewise its rows of q, k and v and its columns of o; with grouped-query attention several query
heads read one key/value head, whose rows may only go when all of its readers go. GPT-2 keeps q, k and v side by side
in one matrix, and stores every matrix transposed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import BoolTensor, Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from helpers.core.errors import LabError
from helpers.model.shards import reason

ROWS, COLUMNS = 0, 1  # sides of a matrix [out, in]


class Architecture(NamedTuple):
    """Where a family of models keeps its parts: the list of layers, and the names of the matrices inside a layer.

    q, k and v may bear one name: then they are one matrix, their rows one after the other. `transposed` matrices lie
    in the checkpoint as [in, out]. With `numbered` positions a model has a table of them, and none beyond its end.
    """

    layers: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    qkv: tuple[str, str, str]
    attention_out: str
    transposed: bool = False
    numbered: bool = False


LLAMA = Architecture(
    layers="model.layers",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
)
GPT2 = Architecture(
    layers="transformer.h",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    qkv=("attn.c_attn", "attn.c_attn", "attn.c_attn"),
    attention_out="attn.c_proj",
    transposed=True,
    numbered=True,
)
GPTJ = Architecture(
    layers="transformer.h",
    mlp_in=("mlp.fc_in",),
    mlp_out="mlp.fc_out",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    numbered=True,
)
ARCHITECTURES = {  # by the `model_type` of a checkpoint's config.json
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gptj": GPTJ,
}


@dataclass(frozen=True)
class Slot:
    """The channels [start, stop) on one side of a weight matrix [out, in]; `stop` None is its end.

    `side` is ROWS when the channels are the matrix's outputs, COLUMNS when they are its inputs.
    """

    module: str
    side: int
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    @property
    def axis(self) -> int:
        """The axis that counts channels in the weight as it is stored; that of a low-rank update B A is `side`."""
        return 1 - self.side if self.transposed else self.side


def mlp_slots(config: PretrainedConfig) -> list[list[Slot]]:
    """The matrices of each layer's MLP: those that read the layer by rows, the one that writes to it by columns.

    Returns:
        per layer [gate, up, down], without a gate [up, down]; channel j of all is the same MLP channel, j < d_ff.

    Raises:
        LabError: an architecture that is not in the table.
    """
    parts = _architecture(config)
    sides = [(name, ROWS) for name in parts.mlp_in] + [(parts.mlp_out, COLUMNS)]
    return [
        [Slot(f"{layer}.{name}", side, transposed=parts.transposed) for name, side in sides]
        for layer in _layers(config, parts)
    ]


def attention_slots(config: PretrainedConfig) -> list[list[Slot]]:
    """The four parts of each layer's attention: q, k and v by rows, o by columns.

    Returns:
        per layer [q, k, v, o]; q and o have n_heads * head_dim channels, k and v n_kv_heads * head_dim. Where q, k and
        v are one matrix, they are three ranges of its rows.

    Raises:
        LabError: an architecture that is not in the table.
    """
    parts, size = _architecture(config), _head_dim(config)
    query, shared = config.num_attention_heads * size, _kv_heads(config) * size
    names, sides = (*parts.qkv, parts.attention_out), (ROWS, ROWS, ROWS, COLUMNS)
    shares = list(zip(names, sides, _ranges(names, (query, shared, shared, query)), strict=True))
    return [
        [Slot(f"{layer}.{name}", side, start, stop, parts.transposed) for name, side, (start, stop) in shares]
        for layer in _layers(config, parts)
    ]


def head_slots(config: PretrainedConfig) -> list[list[list[Slot]]]:
    """Each query head's share of its layer's attention; query heads of one group share k and v.

    Returns:
        [layer][head] -> [q, k, v, o] with the head's channel range in each.

    Raises:
        LabError: an architecture that is not in the table.
    """
    readers = config.num_attention_heads // _kv_heads(config)
    size = _head_dim(config)

    def share(slot: Slot, index: int) -> Slot:
        return replace(slot, start=slot.start + index * size, stop=slot.start + (index + 1) * size)

    return [
        [
            [share(q, head), share(k, head // readers), share(v, head // readers), share(o, head)]
            for head in range(config.num_attention_heads)
        ]
        for q, k, v, o in attention_slots(config)
    ]


def head_masks(config: PretrainedConfig, heads: BoolTensor) -> dict[str, BoolTensor]:
    """The channels that go when these heads go; k and v rows only where every query head of the group goes.

    Args:
        heads: [n_layers, n_heads], True = selected.

    Returns:
        {module: mask [channels]} for the attention matrices of each layer; q, k and v of a fused one together.

    Raises:
        LabError: `heads` has another shape than the model.
    """
    expected = (config.num_hidden_layers, config.num_attention_heads)
    if tuple(heads.shape) != expected:
        raise LabError(f"head mask has shape {list(heads.shape)}, the model [layers, heads] = {list(expected)}")
    size, masks = _head_dim(config), {}
    for (q, k, v, o), chosen in zip(attention_slots(config), heads, strict=True):
        query = chosen.repeat_interleave(size)
        shared = chosen.view(_kv_heads(config), -1).all(dim=1).repeat_interleave(size)
        for slot, mask in ((q, query), (k, shared), (v, shared), (o, query)):
            before = masks.get(slot.module, mask[:0])
            masks[slot.module] = torch.cat([before, mask])
    return masks


def matrices(config: PretrainedConfig) -> dict[str, Slot]:
    """Every matrix of each layer's MLP and attention, with all of its channels: {module: slot}."""
    slots = (slot for layer in mlp_slots(config) + attention_slots(config) for slot in layer)
    return {slot.module: replace(slot, start=0, stop=None) for slot in slots}


def matrix_sizes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every matrix of each layer's MLP and attention, however it is stored."""
    shapes = parameter_shapes(config)
    stored = {module: (slot, tuple(shapes[f"{module}.weight"])) for module, slot in matrices(config).items()}
    return {module: shape[::-1] if slot.transposed else shape for module, (slot, shape) in stored.items()}


def channel_axes(config: PretrainedConfig) -> dict[str, int]:
    """The axis that counts channels in the stored weight, for each matrix of each layer's MLP and attention."""
    return {module: slot.axis for module, slot in matrices(config).items()}


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model without storage, on the meta device.

    Raises:
        LabError: transformers makes no causal language model of this config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind: one architecture misses a size, another a package
        raise LabError(f"architecture '{config.model_type}' makes no causal language model: {reason(error)}") from None


def parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of a model, tied ones once.

    Raises:
        LabError: as `skeleton`.
    """
    return {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one that an adapter of PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm behind the last layer, whose output the head reads."""
    decoder = model.base_model
    return decoder.norm if hasattr(decoder, "norm") else decoder.ln_f


def capped(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """Squash logits as Gemma 2 does between its head and its loss; other models leave them as they are.

    Args:
        logits: as the head gives them, of any shape.
        config: of the model.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens a text may have; None where positions are computed, so that there is always one more."""
    parts = ARCHITECTURES.get(config.model_type)
    return config.max_position_embeddings if parts and parts.numbered else None


def require_positions(config: PretrainedConfig, tokens: int, remedy: str = "") -> None:
    """Refuse a text that a model has no positions for: inside of PyTorch it would end in an IndexError.

    Args:
        tokens: of the longest text.
        remedy: what makes it shorter; by default the setting that cuts training rows.

    Raises:
        LabError: more tokens than positions.
    """
    limit = positions(config)
    if limit is not None and tokens > limit:
        remedy = remedy or f"set lengths.train_tokens to {limit} or lower"
        raise LabError(f"a row has {tokens} tokens, and this {config.model_type} has {limit} positions: {remedy}")


def _architecture(config: PretrainedConfig) -> Architecture:
    if config.model_type not in ARCHITECTURES:
        raise LabError(
            f"architecture '{config.model_type}' is not supported (supported: {', '.join(ARCHITECTURES)}); to add it, "
            f"describe its layers in ARCHITECTURES of helpers/model/architecture.py: "
            f"found {', '.join(_layer_matrices(config))}"
        )
    return ARCHITECTURES[config.model_type]


def _layer_matrices(config: PretrainedConfig) -> list[str]:
    """Names of the weight matrices inside layers, a star for each number."""
    names = (name.removesuffix(".weight") for name, shape in parameter_shapes(config).items() if len(shape) > 1)
    return sorted({starred for name in names if "*" in (starred := re.sub(r"\.\d+(?=\.)", ".*", name))})


def _layers(config: PretrainedConfig, parts: Architecture) -> list[str]:
    return [f"{parts.layers}.{layer}" for layer in range(config.num_hidden_layers)]


def _ranges(names: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each part in the matrix of its name, counted on where several parts are one matrix."""
    ends: dict[str, int] = {}
    for name, width in zip(names, widths, strict=True):
        start = ends.get(name, 0)
        ends[name] = start + width
        yield start, ends[name]


def _kv_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
