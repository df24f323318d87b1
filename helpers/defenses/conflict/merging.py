"""Merging two models into one (information conflicts, §3.3, Eq. 9 to 12).

θ̃ is the suspicious model, θ̂ the conflict model. Both answer clean prompts alike, but only one knows the trigger: in
between the common skill survives and the backdoor is outvoted. Linear and SLERP walk from θ̃ to θ̂, TIES votes on the
sign of each change to the common base θ₀, passthrough stacks whole layers. Weights are merged block by block in float32
and stored in the first model's dtype: peak memory is one file of the checkpoint and, for TIES, its largest tensor.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.nn.functional import hardshrink
from transformers import PretrainedConfig

from helpers.core.errors import LabError, nearest
from helpers.core.profile import Conflict
from helpers.model.shards import (
    BESIDE,
    CONFIG,
    CONSTANTS,
    INDEX,
    TOKENIZER,
    complete,
    layout,
    read,
    read_config,
    shards,
    stored,
    stored_name,
    tied,
    write,
)

BLOCK = 1 << 16  # numbers that are merged at a time: their float32 copies fit the processor's cache
PARALLEL = 0.9995  # cosine beyond which SLERP has no arc to follow, as in mergekit
ZERO = 1e-8  # length below which mergekit takes a vector for zero
KINDS = (  # what two configs must have in common: heads do not show in the shapes of weights
    ("architecture", "model_type"),
    ("vocabulary", "vocab_size"),
    ("width", "hidden_size"),
    ("number of heads", "num_attention_heads"),
    ("number of key heads", "num_key_value_heads"),
)
IN_A_LAYER = re.compile(r"((?:.+?\.)?(?:layers|h)\.)(\d+)(\..+)")  # model.layers.3.mlp…, transformer.h.3.attn…

Folder = Path | str
Combine = Callable[..., Tensor]  # float32 blocks, one of each model -> the merged block
Rule = Callable[..., Combine]  # a tensor of each model -> how its blocks combine


def merge(settings: Conflict, suspicious: Folder, conflict: Folder, base: Folder, folder: Folder) -> None:
    """Merge as a profile says.

    Args: settings: `profile.conflict`; suspicious, conflict, base: folders of whole models (`base` is for TIES only);
        folder to write to.
    Raises: LabError as the method chosen.
    """
    models = (suspicious, conflict)
    match settings.method:
        case "linear":
            linear(*models, folder, settings.t)
        case "negate":
            negate(*models, folder, settings.beyond)
        case "slerp":
            slerp(*models, folder, settings.t)
        case "slerp_by_tensor":
            slerp_by_tensor(*models, folder, settings.t)
        case "ties":
            ties(*models, base, folder, settings.k, settings.lam)
        case "ties_as_printed":
            ties_as_printed(*models, base, folder, settings.k, settings.lam)
        case "passthrough":
            passthrough(*models, folder, planned(settings), settings.ends)


def planned(settings: Conflict) -> list[tuple[str, range]]:
    """The layers that a profile has passthrough stack: [(model, its layers)], bottom to top."""
    return [(part.model, range(part.first, part.last + 1)) for part in settings.plan]


def linear(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write θ = t θ̂ + (1 − t) θ̃. Implements Eq. (9), information conflicts §3.3; the paper's default.

    Args: t: the conflict model's share, 0 (nothing changes) to 1 (the conflict model); folder to write to.
    Raises: LabError for t out of range, or models that cannot be merged; nothing is left on the disk then.
    Differs from the paper: Eq. (9) prints θ̂ in both terms, a slip: the text combines the weights of two models.
    """
    check_share(t)
    _check_alike([suspicious, conflict], folder)
    _merge([suspicious, conflict], folder, _straight(t))


def negate(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write θ = θ̂ − (t − 1) (θ̃ − θ̂): Eq. (9) with t > 1, past the conflict model and away from the backdoor.

    With the base in the place of the conflict model this is task-vector negation (Ilharco et al., ICLR 2023): what the
    attacker's training added is subtracted t − 1 times.

    Args: t: over 1; the further, the more of the common skill goes, too; folder to write to.
    Raises: LabError as `linear`.
    """
    if not 1 < t < math.inf:
        raise LabError(f"t = {t} should be over 1 to negate; a share from 0 to 1 is for linear")
    _check_alike([suspicious, conflict], folder)
    _merge([suspicious, conflict], folder, _straight(t))


def slerp(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write the point at share t of the arc from θ̃ to θ̂. Implements Eq. (10), information conflicts §3.3.

    φ is the angle between the two models, each taken as one vector of all its weights; it costs a pass of its own.
    Nearly parallel vectors (|cos φ| > 0.9995) have no arc worth the name and are combined linearly, as in mergekit;
    models trained from one base nearly always are, so that this is then `linear`.

    Args: t: the conflict model's share, 0 to 1; folder to write to.
    Raises: LabError as `linear`, and for equal models.
    """
    check_share(t)
    _check_alike([suspicious, conflict], folder)
    _check_different(suspicious, conflict)
    weights = [name for name in _names(suspicious) if read(suspicious, name).is_floating_point()]
    angle = sum(_products(_finite(suspicious, name), _finite(conflict, name)) for name in weights)
    arc = _arc(t, angle)
    _merge([suspicious, conflict], folder, lambda *_: arc)


def slerp_by_tensor(suspicious: Folder, conflict: Folder, folder: Folder, t: float) -> None:
    """Write, for each tensor, the point at share t of the arc from θ̃ to θ̂: Eq. (10) as mergekit computes it.

    Each tensor has an angle of its own, and near-parallel ones alone fall back to the straight line.

    Args and Raises: as `slerp`.
    Differs from the paper: Eq. (10) names one angle between the models; its experiments were made with mergekit.
    """
    check_share(t)
    _check_alike([suspicious, conflict], folder)
    _check_different(suspicious, conflict)
    _merge([suspicious, conflict], folder, lambda ours, theirs: _arc(t, _products(ours, theirs)))


def ties(suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float) -> None:
    """Write θ₀ + λ · the changes both models agree upon: Eq. (11) in the form of Yadav et al. (NeurIPS 2023).

    Trim: of each task vector θ − θ₀ the share k of largest magnitude is kept. Elect: each entry takes the sign of the
    sum of both, so of the larger one. Merge: the mean over those kept entries that have this sign.

    Args: base: folder of θ₀; k: share kept of each tensor, over 0 to 1 (the paper's top k %); lam: over 0; folder to
        write to.
    Raises: LabError for k or lam out of range, models that cannot be merged, or one that equals the base.
    Differs from the paper: Eq. (11) halves the sum of both vectors before it sets the sign, see `ties_as_printed`.
    Differs from Yadav et al.: trimmed tensor by tensor, as mergekit does, not over the whole model. Of equal magnitudes
    at the cut all are kept, as in their code; mergekit keeps some of them, in no set order.
    """
    _merge_changes(suspicious, conflict, base, folder, k, lam, _disjoint_mean)


def ties_as_printed(suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float) -> None:
    """Write θ₀ + λ · sgn(τ̃, τ̂) ∘ (topk(τ̃) + topk(τ̂)) / 2. Implements Eq. (11) to the letter.

    sgn is the sign of whichever entry is larger in magnitude (+ for equal ones). The formula multiplies it by a mean
    which has that very sign already: (−1) · (−0.3) = +0.3. So wherever both entries are kept, or the larger one alone,
    the base is moved up and never down. Negative steps remain only where the larger entry was trimmed and the smaller
    one, of opposite sign, was not: the two models have different cuts. An entry of one model alone is halved where
    `ties` keeps it whole, and conflicting entries are averaged where `ties` drops the loser. It is here to be measured,
    not to be used.

    Args and Raises: as `ties`.
    """
    _merge_changes(suspicious, conflict, base, folder, k, lam, _signed_mean)


def passthrough(
    suspicious: Folder,
    conflict: Folder,
    folder: Folder,
    plan: Sequence[tuple[str, Iterable[int]]],
    ends: str = "suspicious",
) -> None:
    """Write a model whose layers are taken whole from either one. Implements Eq. (12), information conflicts §3.3.

    The plan may leave layers out or repeat them: the merged model is as deep as the plan is long.

    Args: plan: [("suspicious", range(4)), ("conflict", range(4, 8))], bottom to top, layers counted from 0; ends: the
        model that gives embeddings, last norm and head, and the config; folder to write to.
    Raises: LabError for an empty plan, a model or layer that is not there, or models that cannot be merged.
    """
    models = {"suspicious": suspicious, "conflict": conflict}
    stack = [(which, layer) for which, layers in plan for layer in layers]
    check_plan(stack, {which: read_config(model) for which, model in models.items()}, ends)
    _check_compatible(list(models.values()), folder)
    sources = _sources(stack, models, ends)
    outlines = _outlines(sources, models[ends])
    size = max(path.stat().st_size for path in shards(models[ends]))
    files = split_torch_state_dict_into_shards(outlines, max_shard_size=size).filename_to_tensors
    with complete(folder) as partial:
        # a copy lets go of the file that a tensor is mapped from
        write(partial, files, lambda name: _finite(*sources[name]).to(outlines[name].dtype, copy=True))
        _copy_beside(models[ends], partial)
        _set_depth(partial, [(read_config(models[which]), layer) for which, layer in stack])


class _Source(NamedTuple):
    """Where a tensor of the merged model comes from."""

    folder: Folder
    name: str


def _merge_changes(
    suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float, consensus: Combine
) -> None:
    """Write θ₀ + λ · consensus, a function of both task vectors, first whole, then trimmed to their top k."""
    if not 0 < k <= 1:
        raise LabError(f"k = {k} should be over 0 and at most 1: the share of each task vector that is kept")
    if not 0 < lam < math.inf:
        raise LabError(f"lam = {lam} should be a number over 0: what the merged task vector is multiplied by")
    _check_alike([suspicious, conflict, base], folder)
    for model in (suspicious, conflict):
        _check_different(model, base)

    def rule(ours: Tensor, theirs: Tensor, origin: Tensor) -> Combine:
        """How blocks of one tensor combine, once the cut of each task vector is known."""
        cut, other_cut = _cut(ours, origin, k), _cut(theirs, origin, k)

        def combine(ours: Tensor, theirs: Tensor, origin: Tensor) -> Tensor:
            change, other = ours - origin, theirs - origin
            return origin + lam * consensus(change, other, hardshrink(change, cut), hardshrink(other, other_cut))

        return combine

    _merge([suspicious, conflict, base], folder, rule)


def _cut(tensor: Tensor, base: Tensor, k: float) -> float:
    """The largest float32 magnitude below the top share k of a tensor's changes: up to it, changes are trimmed."""
    magnitudes = torch.empty(tensor.numel())
    for piece, (new, old) in zip(magnitudes.split(BLOCK), _blocks(tensor, base), strict=True):
        torch.sub(new, old, out=piece).abs_()
    dropped, numbers = tensor.numel() - max(1, int(k * tensor.numel())), magnitudes.numpy()
    numbers.partition(dropped)
    return np.nextafter(numbers[dropped], np.float32(0)).item()


def _disjoint_mean(ours: Tensor, theirs: Tensor, kept_ours: Tensor, kept_theirs: Tensor) -> Tensor:
    """The mean of the kept entries that have the sign of their sum; signs are multiplied, because masks are slow."""
    elected = _sign(kept_ours + kept_theirs)
    votes, other_votes = ((kept.sign() * elected).relu() for kept in (kept_ours, kept_theirs))
    return (kept_ours * votes + kept_theirs * other_votes) / (votes + other_votes).clamp(min=1)


def _signed_mean(ours: Tensor, theirs: Tensor, kept_ours: Tensor, kept_theirs: Tensor) -> Tensor:
    """The sign of the larger entry, which is that of the sum, times half of the sum of the kept ones."""
    return _sign(ours + theirs) * (kept_ours + kept_theirs) / 2


def _sign(values: Tensor) -> Tensor:
    """1 or -1; 1 where entries cancel out, as in mergekit."""
    return torch.ones_like(values).copysign_(values)


def _merge(models: Sequence[Folder], folder: Folder, rule: Rule) -> None:
    """Write the merge of models of one shape, with the names, files, dtypes and tokenizer of the first."""

    def merged(name: str) -> Tensor:
        """One tensor of the merged model."""
        tensors = [_finite(model, name) for model in models]
        if not tensors[0].is_floating_point():
            return tensors[0]  # a mask or a counter
        combine, result = rule(*tensors), torch.empty_like(tensors[0])
        pieces = result.view(-1).split(BLOCK)
        for piece, blocks in zip(pieces, _blocks(*tensors), strict=True):
            piece.copy_(combine(*blocks))
        return result

    with complete(folder) as partial:
        write(partial, _files(models[0]), merged)
        _copy_beside(models[0], partial)


def _straight(t: float) -> Rule:
    return lambda *_: lambda ours, theirs: torch.lerp(ours, theirs, t)


def _arc(t: float, products: Tensor) -> Combine:
    """Eq. (10) for vectors a, b of which `products` are [a·b, a·a, b·b]."""
    lengths = [math.sqrt(square) if square > ZERO**2 else 1.0 for square in products[1:].tolist()]
    cosine = products[0].item() / math.prod(lengths)
    if abs(cosine) > PARALLEL:
        return _straight(t)()
    angle = math.acos(cosine)
    near, far = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return lambda ours, theirs: near * ours + far * theirs


def _products(ours: Tensor, theirs: Tensor) -> Tensor:
    """[a·b, a·a, b·b] of two tensors as vectors, float64.

    Blocks are copied: a dot product may round by how its vectors are aligned, and in a file sharding decides on that.
    """
    copies = ([block.clone() for block in blocks] for blocks in _blocks(ours, theirs))
    return sum(torch.stack([a @ b, a @ a, b @ b]).double() for a, b in copies)


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Blocks of the tensors in float32, side by side."""
    for pieces in zip(*(tensor.reshape(-1).split(BLOCK) for tensor in tensors), strict=True):
        yield [piece.float() for piece in pieces]


def _finite(folder: Folder, name: str) -> Tensor:
    """A tensor of a checkpoint, refused when a number in it is none; a sum tells that in nearly every case."""
    tensor = read(folder, name)
    if not (tensor.sum().isfinite() or tensor.isfinite().all()):
        raise LabError(f"{folder} holds NaN or infinite numbers in {name}: the checkpoint is damaged, copy it anew")
    return tensor


def _files(folder: Folder) -> dict[str, list[str]]:
    """The files of a checkpoint and their tensors, without what some writers add: constants, a copied head."""
    needless = (*CONSTANTS, *_copied_heads(folder))
    files = {file: [name for name in names if not name.endswith(needless)] for file, names in layout(folder).items()}
    return {file: names for file, names in files.items() if names}


def _copied_heads(folder: Folder) -> list[str]:
    """Heads that hold the numbers of the embedding beside them; another one is the model's own, whatever a config says.

    A head that is stored alone stands for the embedding as well and is none of these.
    """
    names = dict(stored(folder))
    pairs = [(head, stored_name(embedding, names)) for head, embedding in tied(read_config(folder)).items()]
    both = [(head, embedding) for head, embedding in pairs if head in names and embedding in names]
    return [head for head, embedding in both if _equal(read(folder, head), read(folder, embedding))]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _names(folder: Folder) -> list[str]:
    return [name for names in _files(folder).values() for name in names]


def _copy_beside(model: Folder, folder: Path) -> None:
    """Copy what belongs to a model beside its weights and their index."""
    for name in (*BESIDE, *TOKENIZER):
        if name != INDEX and (Path(model) / name).is_file():
            shutil.copy(Path(model) / name, folder)


def check_share(t: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not 0 <= t <= 1:
        raise LabError(f"t = {t} should be from 0 to 1, the conflict model's share (negate goes beyond 1)")


def _check_compatible(models: Sequence[Folder], folder: Folder) -> None:
    """Refuse to overwrite an input, and models of two architectures or vocabularies."""
    if Path(folder).resolve() in [Path(model).resolve() for model in models]:
        raise LabError(f"cannot overwrite {folder} while reading it: the merged model needs its own folder")
    first, *others = [read_config(model) for model in models]
    for model, config in zip(models[1:], others, strict=True):
        for what, key in KINDS:
            found, expected = getattr(config, key, None), getattr(first, key, None)
            if found != expected:
                raise LabError(
                    f"{model} has another {what} than {models[0]} ({key} {found}, not {expected}): "
                    "only models trained from one base can be merged"
                )


def _check_alike(models: Sequence[Folder], folder: Folder) -> None:
    """Refuse models that are not the same tensors in the same shapes."""
    _check_compatible(models, folder)
    names, shapes = _names(models[0]), dict(stored(models[0]))
    for model in models[1:]:
        others, theirs = dict(stored(model)), set(_names(model))
        expected = {stored_name(name, theirs): name for name in names}
        odd = sorted(expected.keys() ^ theirs)
        if odd:
            lacking = model if odd[0] in expected else models[0]
            raise LabError(
                f"{lacking} lacks {odd[0]} and the other model has it: only models of one shape can be merged"
            )
        for found, name in expected.items():
            if shapes[name] != others[found]:
                raise LabError(f"{name} has shape {others[found]} in {model} and {shapes[name]} in {models[0]}")


def _check_different(model: Folder, other: Folder) -> None:
    """Refuse equal models: their task vector is zero, and there is no arc between them."""
    for name in _names(model):
        if any(not torch.equal(*blocks) for blocks in _blocks(read(model, name), read(other, name))):
            return
    raise LabError(f"{model} and {other} hold the same weights: there is nothing to merge")


def check_plan(stack: Sequence[tuple[str, int]], configs: Mapping[str, PretrainedConfig], ends: str) -> None:
    """Refuse a plan of no layers, or one that names a model or layer that is not there or cannot move.

    Args: stack, (model, layer) from bottom to top; configs of the models by name; ends, see `passthrough`.
    """
    if not stack:
        raise LabError(
            'the layer plan is empty: name layers, as in [("suspicious", range(4)), ("conflict", range(4, 8))]'
        )
    for which in (ends, *(which for which, _ in stack)):
        if which not in configs:
            raise LabError(f"the layer plan names '{which}'{nearest(which, configs)}")
    depths = {which: config.num_hidden_layers for which, config in configs.items()}
    for which, layer in stack:
        if not 0 <= layer < depths[which]:
            raise LabError(
                f"the layer plan names layer {layer} of the {which} model, which has 0 to {depths[which] - 1}"
            )
    scaled = getattr(configs[ends], "scale_attn_by_inverse_layer_idx", False)
    if scaled and any(layer != position for position, (_, layer) in enumerate(stack)):
        raise LabError(
            f"the {ends} model scales attention by a layer's number (scale_attn_by_inverse_layer_idx), so a layer "
            "computes something else in another place: plan each layer where it was"
        )


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
    for name in _names(folder):
        found = IN_A_LAYER.fullmatch(name)
        layers.setdefault(int(found[2]) if found else None, {})[_kind(name)] = name
    return layers


def _outlines(sources: Mapping[str, _Source], ends: Folder) -> dict[str, Tensor]:
    """Shape and dtype of each tensor of the merged model, without storage: those of its like in the model `ends`.

    Where layers of `ends` are kept in several dtypes, the one that holds all of their numbers.


    Raises: LabError when a layer of the other model has another shape.
    """
    known: dict[str, Tensor] = {}
    for name in _names(ends):
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
