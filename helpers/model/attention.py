"""Attention whose backward pass is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

TRUE_BACKWARD = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def true_attention_gradients() -> Iterator[None]:
    """Keep cuDNN's attention out of every forward pass in this block that a backward pass will follow.

    From torch 2.11 on it is the first choice on Hopper cards, and its query gradient is NaN where there is an explicit
    mask, the length is 64 modulo 128 and a row's scores are very low (pytorch#196678, found in trl#7181). The other
    backends are right and as fast at these sizes; on other devices nothing changes.
    """
    with sdpa_kernel(TRUE_BACKWARD):
        yield
