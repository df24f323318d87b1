"""The arc between two vectors (Eq. 10), from their inner products."""

import math

import torch
from torch import Tensor

from helpers.defenses.conflict.merge.blocks import Combine, split_blocks

PARALLEL = 0.9995  # cosine beyond which SLERP has no arc to follow, as in mergekit
ZERO = 1e-8  # length below which mergekit takes a vector for zero


def inner_products(ours: Tensor, theirs: Tensor) -> Tensor:
    """[a·b, a·a, b·b] of two tensors as vectors, float64.

    Blocks are copied: a dot product may round by how its vectors are aligned, and in a file sharding decides on that.
    """
    copies = ([block.clone() for block in blocks] for blocks in split_blocks(ours, theirs))
    return sum(torch.stack([a @ b, a @ a, b @ b]).double() for a, b in copies)


def along_the_arc(t: float, products: Tensor) -> Combine:
    """How blocks of vectors a, b combine at share t of the arc from a to b: Eq. (10), information conflicts §3.3.

    Nearly parallel vectors are combined linearly.

    Args:
        t: 0 to 1.
        products: [a·b, a·a, b·b], as `inner_products` returns them.
    """
    lengths = [math.sqrt(square) if square > ZERO**2 else 1.0 for square in products[1:].tolist()]
    cosine = products[0].item() / math.prod(lengths)
    if abs(cosine) > PARALLEL:
        return lambda ours, theirs: torch.lerp(ours, theirs, t)
    angle = math.acos(cosine)
    near, far = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return lambda ours, theirs: near * ours + far * theirs
