"""Tensors in float32, a block at a time, so that no whole tensor is ever held in more bits than it is stored in."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers that are merged at a time: their float32 copies fit the processor's cache

Combine = Callable[..., Tensor]  # a tensor of each model, or a block of each, -> the merged one


def split_blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Blocks of tensors of one shape in float32, side by side."""
    for pieces in zip(*(tensor.reshape(-1).split(BLOCK) for tensor in tensors), strict=True):
        yield [piece.float() for piece in pieces]


def map_blocks(combine: Combine, *tensors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor whose blocks are `combine(*blocks)`, of the shape of the first one.

    Args:
        combine: a function of one float32 block of each tensor.
        tensors: of one shape.
        dtype: of the result; by default that of the first tensor.
    """
    result = torch.empty_like(tensors[0], dtype=dtype)
    for piece, blocks in zip(result.view(-1).split(BLOCK), split_blocks(*tensors), strict=True):
        piece.copy_(combine(*blocks))
    return result
