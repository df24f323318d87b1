"""Four bits: NF4 with double quantization (Dettmers et al. 2023), the rounding that the lab's 4-bit bases have."""

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.defenses.pruning.blocks import every_matrix


def rounded_to_4_bits(weight: Tensor) -> Tensor:
    """A matrix packed into 4 bits and unpacked again.

    Numbers are packed in blocks of 64, one row after the other. It goes in as one long row: bitsandbytes 0.50 unpacks
    matrices whose rows are no multiple of 64 wrongly on some CPUs (see `four_bit.kept_whole`), and the blocks are the
    same.

    Args:
        weight: [out, in], 16 or 32 bits.

    Returns:
        [out, in] in the same dtype.
    """
    packed, state = bnb.functional.quantize_4bit(weight.reshape(-1), compress_statistics=True, quant_type="nf4")
    return bnb.functional.dequantize_4bit(packed, state).view(weight.shape)


@torch.no_grad()
def round_to_4_bits(model: PreTrainedModel) -> float:
    """Round every matrix inside the layers, in place.

    Args:
        model: a whole one: an adapter beside it would keep all of its bits.

    Returns:
        the length of what rounding changed, relative to that of the weights.
    """
    changed = total = 0.0
    for weight in every_matrix(model):
        rounded = rounded_to_4_bits(weight)
        changed += float((rounded - weight).double().square().sum())
        total += float(weight.double().square().sum())
        weight.copy_(rounded)
    return (changed / total) ** 0.5
