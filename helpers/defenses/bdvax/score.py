"""How suspicious is a channel? Strong change, and the same change in every variant (Eq. 2).

The strength term is the mean length of the channel's deltas, the alignment term the mean positive cosine between
the deltas of two variants. Different triggers and behaviors share one thing, the binding of a trigger to a
behavior, so what recurs across variants is the machinery of backdoors rather than any one of them. Both terms
are functions of the Gram matrices made by `deltas`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PretrainedConfig

from helpers.access import Access
from helpers.access.deltas import Factors, Folders, GramOf, slot_gram
from helpers.core.errors import LabError, nearest
from helpers.core.profile import Signature
from helpers.model.architecture import Slot, attention_slots, head_slots, matrix_sizes, mlp_slots
from helpers.model.checkpoint import load_config

Scores = dict[str, Tensor]
CHANNELS, HEADS = "scores.safetensors", "heads.safetensors"  # the files of both rankings
COMBINE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sum": lambda strength, alignment, lam: strength + lam * alignment,
    "product": lambda strength, alignment, lam: strength * alignment,
    "norm": lambda strength, alignment, lam: strength,
    "alignment": lambda strength, alignment, lam: alignment,
}


def strength(gram: Tensor) -> Tensor:
    """Mean length of a channel's deltas. Implements the first term of Eq. (2), BD-VAX §4.2.

    Args:
        gram: [N, N, channels], of the N deltas of a channel.

    Returns:
        [channels], >= 0, in the unit of the weights.
    """
    return _norms(gram).mean(dim=0)


def alignment(gram: Tensor) -> Tensor:
    """Mean over pairs of variants of max(0, cos). Implements the second term of Eq. (2), BD-VAX §4.2.

    Args:
        gram: [N, N, channels]; a delta of length zero points nowhere and aligns with nothing.

    Returns:
        [channels] in [0, 1].

    Raises:
        LabError: N < 2.
    """
    n = gram.shape[0]
    if n < 2:
        raise LabError(f"alignment compares variants with each other: it needs N >= 2, got N = {n}; or combine 'norm'")
    norms = _norms(gram)
    first, second = torch.triu_indices(n, n, offset=1)
    lengths = norms[first] * norms[second]
    cosines = gram[first, second] / lengths.where(lengths > 0, torch.inf)
    return cosines.clamp(0, 1).mean(dim=0)


def combine(strength: Tensor, alignment: Tensor, how: str, lam: float) -> Tensor:
    """One score from the two terms. Implements Eq. (2), BD-VAX §4.2, with how = "sum".

    Args:
        strength: [channels], >= 0.
        alignment: [channels] in [0, 1].
        how: "sum", "product", "norm" or "alignment".
        lam: λ >= 0, used by "sum".

    Returns:
        [channels].

    Raises:
        LabError: another `how`.
    """
    _check_choice("combine", how, COMBINE)
    return COMBINE[how](strength, alignment, lam)


def score_channels(
    grams: Mapping[str, Tensor], granularity: str, how: str, lam: float, slots: Sequence[Sequence[Slot]]
) -> Scores:
    """Eq. (2) for every MLP channel, from Gram matrices.

    Args:
        grams: {module: [N, N, channels]}.
        granularity: "matrix" scores each matrix on its own, "neuron" the channel's three slices concatenated, one score
            for all three.
        how, lam: as in `combine`.
        slots: the matrices of each layer's MLP.

    Returns:
        {module: scores [channels]}, float64, higher = more suspicious.

    Raises:
        LabError: another granularity, or as `combine` and `alignment`.

    Differs from the paper:
        it leaves open what a channel is, so both readings are offered.
    """
    _check_choice("granularity", granularity, ("matrix", "neuron"))
    if granularity == "matrix":
        return {slot.module: _score(grams[slot.module], how, lam) for layer in slots for slot in layer}
    scores = {}
    for layer in slots:
        together = _score(sum(grams[slot.module] for slot in layer), how, lam)
        scores |= {slot.module: together for slot in layer}
    return scores


def score_mlp(gram_of: GramOf, config: PretrainedConfig, signature: Signature) -> Scores:
    """Eq. (2) for all MLP channels of a model, one layer's Gram matrices at a time.

    Args:
        gram_of: of `Access.variant_pairs` or, for what an attack itself has changed, `Access.own_update`.
        config: of the scored model.
        signature: how to score.

    Returns:
        as `score_channels`.
    """
    scores = {}
    for layer in mlp_slots(config):
        grams = {slot.module: gram_of(slot) for slot in layer}
        scores |= score_channels(grams, signature.granularity, signature.combine, signature.lam, [layer])
    return scores


def score_heads(gram_of: GramOf, config: PretrainedConfig, signature: Signature) -> Tensor:
    """Eq. (2) for every attention head: its q, k and v rows and its o columns, concatenated.

    Keys and values that a group of query heads shares count for each head of the group.

    Args:
        gram_of, config, signature: as in `score_mlp`; the granularity is not read here.

    Returns:
        [n_layers, n_heads], float64.

    Differs from the paper:
        it suppresses heads without saying how they are scored.
    """
    rows = []
    for layer, heads in zip(attention_slots(config), head_slots(config), strict=True):
        matrices = {slot.module: slot for slot in layer}  # one where q, k and v are fused
        grams = {module: gram_of(slot) for module, slot in matrices.items()}
        parts = [sum(grams[p.module][..., p.start : p.stop].sum(dim=-1) for p in head) for head in heads]
        rows.append(_score(torch.stack(parts, dim=-1), signature.combine, signature.lam))
    return torch.stack(rows)


def score_variants(access: Access, poisoned: Folders, clean: Folders, folder: Path | str) -> None:
    """Score all channels and heads by the differences between pairs of variants, and write both rankings to a folder.

    Args:
        access: to the suspicious model; the profile's `signature` says how to score.
        poisoned, clean: folders of the variants, pair i at position i.
        folder: to write to; `load_rankings` reads it.

    Raises:
        LabError: as `score_mlp`, or incomplete pairs.
    """
    signature, config = access.profile.signature, load_config(access.profile.model)
    gram_of = access.variant_pairs(poisoned, clean)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_scores(Path(folder) / CHANNELS, score_mlp(gram_of, config, signature), **signature.model_dump())
    save_scores(Path(folder) / HEADS, {"heads": score_heads(gram_of, config, signature)})


def load_rankings(folder: Path | str) -> tuple[Scores, Tensor]:
    """The scores of the channels, {module: [channels]}, and of the heads, [n_layers, n_heads], of `score_variants`.

    Raises:
        LabError: no such files.
    """
    return load_scores(Path(folder) / CHANNELS)[0], load_scores(Path(folder) / HEADS)[0]["heads"]


def blank_rankings(config: PretrainedConfig) -> tuple[Scores, Tensor]:
    """Scores of zero in the shape and order of `load_rankings`: what a random ranking takes the place of."""
    sizes, heads = matrix_sizes(config), head_slots(config)
    channels = {slot.module: sizes[slot.module][slot.side] for layer in mlp_slots(config) for slot in layer}
    return {module: torch.zeros(channels[module]) for module in sorted(channels)}, torch.zeros(
        len(heads), len(heads[0])
    )


def random_scores(like: Scores, seed: int, granularity: str = "matrix") -> Scores:
    """The control without a signature: uniform scores, as many as in `like`.

    Args:
        like: scores {module: [channels]}.
        granularity: "neuron" shares the scores across a block.

    Returns:
        {module: [channels]} in [0, 1), float64; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, drawn = {}, {}
    for module, values in like.items():
        key = module.rpartition(".")[0] if granularity == "neuron" else module
        if key not in drawn:
            drawn[key] = torch.rand(len(values), generator=generator, dtype=torch.float64)
        scores[module] = drawn[key]
    return scores


def random_heads(like: Tensor, seed: int) -> Tensor:
    """The same control for attention heads: uniform scores in the shape of `like` [n_layers, n_heads]."""
    return random_scores({"heads": like.flatten()}, seed)["heads"].view_as(like)


def norm_scores(
    weights: Mapping[str, Tensor | Factors], slots: Sequence[Sequence[Slot]], granularity: str = "matrix"
) -> Scores:
    """The length of every channel of one set of matrices; of an attacker's adapter this is its true delta.

    Args:
        weights: {module: matrix as it is stored, or low-rank update}.
        slots: the matrices of each layer's MLP.
        granularity: as in `score_channels`.

    Returns:
        {module: [channels]}, float64.
    """
    grams = {slot.module: slot_gram(weights[slot.module], slot) for layer in slots for slot in layer}
    return score_channels(grams, granularity, "norm", 0.0, slots)


def magnitude_scores(
    weights: Mapping[str, Tensor | Factors], slots: Sequence[Sequence[Slot]], granularity: str = "matrix"
) -> Scores:
    """The control of magnitude pruning, which removes the smallest channels: minus their length.

    Args:
        weights, slots, granularity: as in `norm_scores`.

    Returns:
        {module: [channels]}, <= 0, float64.
    """
    return {module: -norms for module, norms in norm_scores(weights, slots, granularity).items()}


def rank_correlation(scores: Scores, truth: Scores) -> float:
    """Spearman correlation of two rankings inside each matrix, averaged over the matrices.

    Inside, because that is where the default scope ranks: matrices differ in the size of all their scores.

    Returns:
        value in [-1, 1]; a matrix whose scores are all equal ranks nothing and counts as 0.

    Raises:
        LabError: the two score different matrices.
    """
    if scores.keys() != truth.keys():
        raise LabError(f"the rankings cover different matrices: {sorted(scores.keys() ^ truth.keys())}")
    return sum(_spearman(scores[module], truth[module]) for module in scores) / len(scores)


def save_scores(path: Path | str, scores: Scores, **facts: object) -> None:
    """Write scores to a safetensors file.

    Args:
        facts: how they were made; values that JSON can hold.
    """
    tensors = {module: values.clone() for module, values in scores.items()}  # safetensors refuses shared memory
    save_file(tensors, path, metadata={"facts": json.dumps(facts, sort_keys=True)})


def load_scores(path: Path | str) -> tuple[Scores, dict[str, object]]:
    """Scores and facts as `save_scores` wrote them, modules in alphabetical order.

    Raises:
        LabError: no such file.
    """
    if not Path(path).is_file():
        raise LabError(f"{path} is missing; notebook 04_score_signature makes it")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def _score(gram: Tensor, how: str, lam: float) -> Tensor:
    _check_choice("combine", how, COMBINE)
    if how == "norm":  # defined for a single variant, where alignment is not
        return strength(gram)
    return combine(strength(gram), alignment(gram), how, lam)


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal().T.clamp(min=0).sqrt()


def _spearman(scores: Tensor, truth: Tensor) -> float:
    if min(scores.unique().numel(), truth.unique().numel()) < 2:
        return 0.0
    return float(spearmanr(scores.numpy(), truth.numpy()).statistic)


def _check_choice(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise LabError(f"{name} = '{value}' is unknown{nearest(value, valid)}")
