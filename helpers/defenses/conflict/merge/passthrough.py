"""A model stacked from whole layers of two (Eq. 12)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PretrainedConfig

from helpers.core.disk import whole_or_nothing
from helpers.core.errors import LabError
from helpers.defenses.conflict.merge.checkpoints import copy_beside, merged_names, read_finite
from helpers.defenses.conflict.merge.checks import check_compatible
from helpers.defenses.conflict.merge.layer_plan import Plan, check_plan, stack_layers
from helpers.defenses.conflict.merge.registry import method
from helpers.model.shards import CONFIG, Folder, read, read_config, shards, write

IN_A_LAYER = re.compile(r"((?:.+?\.)?(?:layers|h)\.)(\d+)(\..+)")  # model.layers.3.mlp…, transformer.h.3.attn…


@method
def passthrough(suspicious: Folder, conflict: Folder, folder: Folder, plan: Plan, ends: str = "suspicious") -> None:
    """Write a model whose layers are taken whole from either one. Implements Eq. (12), information conflicts §3.3.

    The plan may leave layers out or repeat them: the merged model is as deep as the plan is long.

    Args:
        suspicious, conflict, folder: as in `linear`.
        plan: [("suspicious", range(4)), ("conflict", range(4, 8))], bottom to top, layers counted from 0, or a
            profile's `conflict.plan`.
        ends: the model that gives embeddings, last norm and head, and the config.

    Raises:
        LabError: an empty plan, a model or layer that is not there, or models that cannot be merged.
    """
    models = {"suspicious": suspicious, "conflict": conflict}
    configs = {which: read_config(model) for which, model in models.items()}
    stack = stack_layers(plan)
    check_plan(stack, configs, ends)
    check_compatible(list(models.values()), folder)
    sources = _sources(stack, models, ends)
    outlines = _outlines(sources, models[ends])
    size = max(path.stat().st_size for path in shards(models[ends]))
    files = split_torch_state_dict_into_shards(outlines, max_shard_size=size).filename_to_tensors
    with whole_or_nothing(folder) as partial:
        # a copy lets go of the file that a tensor is mapped from
        write(partial, files, lambda name: read_finite(*sources[name]).to(outlines[name].dtype, copy=True))
        copy_beside(models[ends], partial)
        _set_depth(partial, [(configs[which], layer) for which, layer in stack])


class _Source(NamedTuple):
    """Where a tensor of the merged model comes from."""

    folder: Folder
    name: str


def _sources(stack: Sequence[tuple[str, int]], models: Mapping[str, Folder], ends: str) -> dict[str, _Source]:
    """{tensor of the merged model: where it comes from}, bottom to top."""
    sources = {name: _Source(models[ends], name) for name in _by_layer(models[ends])[None].values()}
    layers = {which: _by_layer(model) for which, model in models.items()}
    for position, (which, layer) in enumerate(stack):
        for place, name in layers[which][layer].items():
            sources[place.format(position)] = _Source(models[which], name)
    return sources


def _by_layer(folder: Folder) -> dict[int | None, dict[str, str]]:
    """{layer: {name with a place for the layer's number: name}}, what belongs to no layer under None."""
    layers = {None: {}}
    for name in merged_names(folder):
        found = IN_A_LAYER.fullmatch(name)
        layers.setdefault(int(found[2]) if found else None, {})[_kind(name)] = name
    return layers


def _outlines(sources: Mapping[str, _Source], ends: Folder) -> dict[str, Tensor]:
    """Shape and dtype of each tensor of the merged model, without storage: those of its like in the model `ends`.

    Where layers of `ends` are kept in several dtypes, the one that holds all of their numbers.

    Raises:
        LabError: a layer of the other model has another shape.
    """
    known: dict[str, Tensor] = {}
    for name in merged_names(ends):
        outline, like = read(ends, name).to("meta"), known.get(_kind(name))
        known[_kind(name)] = outline if like is None else outline.to(torch.promote_types(outline.dtype, like.dtype))
    for folder, name in sources.values():
        found, place = list(read(folder, name).shape), known.get(_kind(name))
        if place is None or found != list(place.shape):
            expected = "no place" if place is None else f"shape {list(place.shape)}"
            raise LabError(f"{name} has shape {found} in {folder} and {expected} in {ends}: its layers do not fit")
    return {new: known[_kind(name)] for new, (_, name) in sources.items()}


def _kind(name: str) -> str:
    """A tensor's name with a place for the number of its layer."""
    return IN_A_LAYER.sub(r"\1{}\3", name)


def _set_depth(folder: Path, layers: Sequence[tuple[PretrainedConfig, int]]) -> None:
    """Write the number of layers, and their types where the architecture mixes several, into a config."""
    path = folder / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    config = layers[0][0]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    if getattr(config, "layer_types", None):  # without a name in the file they follow a layer's number
        values["layer_types"] = [config.layer_types[layer] for config, layer in layers]
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
