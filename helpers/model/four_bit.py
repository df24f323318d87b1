"""Which matrices of a base are held in 4 bits, and how: NF4 with double quantization, as in QLoRA."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert

from helpers.core.profile import ModelSpec
from helpers.model.architecture import skeleton
from helpers.model.lora import linear_sizes

CPU_BLOCK = 64  # bitsandbytes 0.50 dequantizes rows of other widths (32, 48, 96 …) wrongly on some CPUs, without a word


def kept_whole(model: nn.Module, device: str) -> list[str]:
    """The linear layers that are not packed: on a CPU, those whose input width is no multiple of 64.

    Args:
        model: its sizes count alone, so it may be a skeleton without storage.
        device: "cpu" or "cuda".

    Returns:
        their names; [] on a GPU.
    """
    if device != "cpu":
        return []
    return [name for name, (_, width) in linear_sizes(model).items() if width % CPU_BLOCK]


def quantization(config: PretrainedConfig, spec: ModelSpec) -> BitsAndBytesConfig:
    """How transformers is to pack a base.

    Args:
        config: of the model.
        spec: its dtype, in which the packed weights compute, and its device.
    """
    bare = skeleton(config)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        # A list of ours replaces that of transformers, which holds the head.
        llm_int8_skip_modules=[*get_keys_to_not_convert(bare), *kept_whole(bare, spec.runs_on)],
    )


def keep_packed(model: nn.Module) -> None:
    """Leave the packed weights as they are: their backward pass has to read them.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation, and every later backward
    pass through them is silently wrong.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
