"""Merging what two models changed in their common base, trimmed to the largest changes (Eq. 11)."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from helpers.core.errors import LabError
from helpers.defenses.conflict.merge.blocks import map_blocks
from helpers.defenses.conflict.merge.checks import check_different
from helpers.defenses.conflict.merge.streaming import ModelStream
from helpers.model.shards import Folder

Consensus = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of blocks of both task vectors, whole, then trimmed


def merge_task_vectors(
    suspicious: Folder, conflict: Folder, base: Folder, folder: Folder, k: float, lam: float, consensus: Consensus
) -> None:
    """Write θ₀ + λ · consensus(τ̃, τ̂, topk(τ̃), topk(τ̂)), where τ = θ − θ₀ is what a model changed.

    Args:
        suspicious, conflict, folder: as in `linear`.
        base: folder of θ₀.
        k: share kept of each tensor, over 0 to 1.
        lam: λ, over 0.
        consensus: a function of one block of each task vector, first whole, then with zeros below its top k.

    Raises:
        LabError: k or lam out of range, models that cannot be merged, or one that equals the base.
    """
    if not 0 < k <= 1:
        raise LabError(f"k = {k} should be over 0 and at most 1: the share of each task vector that is kept")
    if not 0 < lam < math.inf:
        raise LabError(f"lam = {lam} should be a number over 0: what the merged task vector is multiplied by")
    models = ModelStream([suspicious, conflict, base], folder)
    for model in (suspicious, conflict):
        check_different(model, base)

    def merge_tensors(ours: Tensor, theirs: Tensor, origin: Tensor) -> Tensor:
        """TIES of one tensor: what is small is cut by the whole tensor's bound, the rest goes block by block."""
        cut, other_cut = _cut(ours, origin, k), _cut(theirs, origin, k)

        def merge_blocks(ours: Tensor, theirs: Tensor, origin: Tensor) -> Tensor:
            change, other = ours - origin, theirs - origin
            return origin + lam * consensus(change, other, hardshrink(change, cut), hardshrink(other, other_cut))

        return map_blocks(merge_blocks, ours, theirs, origin)

    models.write_tensors(merge_tensors)


def sign(values: Tensor) -> Tensor:
    """1 or -1; 1 where entries cancel out, as in mergekit."""
    return torch.ones_like(values).copysign_(values)


def _cut(tensor: Tensor, base: Tensor, k: float) -> float:
    """The largest float32 magnitude below the top share k of a tensor's changes: up to it, changes are trimmed."""
    magnitudes = map_blocks(lambda new, old: (new - old).abs_(), tensor, base, dtype=torch.float32)
    dropped, numbers = tensor.numel() - max(1, int(k * tensor.numel())), magnitudes.view(-1).numpy()
    numbers.partition(dropped)
    return np.nextafter(numbers[dropped], np.float32(0)).item()
