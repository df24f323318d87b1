"""Cutting the signature out (BD-VAX §4.3), channel by channel and, as an option, head by head.

With adapter access the suspicious update is B A, so a channel's share of it vanishes with one row of `lora_B`
(matrices whose channels are rows) or one column of `lora_A` (columns); the base model stays untouched. With full
access there is nothing to fall back on: the channel's weights are drawn anew, as at the birth of a model, and
fine-tuning gives them a new meaning.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import BoolTensor, Generator, Tensor
from transformers import PretrainedConfig

from helpers.core.errors import LabError
from helpers.core.profile import Profile
from helpers.model.adapters import ADAPTER_FILE, PREFIX, read_adapter
from helpers.model.architecture import COLUMNS, ROWS, head_masks, matrices, matrix_sizes
from helpers.model.checkpoint import load_config
from helpers.model.shards import ADAPTER_CONFIG, FORMAT_FILE, find, rewrite, stored

Masks = Mapping[str, BoolTensor]


def suppress(
    profile: Profile,
    access: str,
    suspicious: Path | str,
    masks: Masks,
    seed: int,
    folder: Path | str,
    heads: BoolTensor | None = None,
) -> None:
    """Write a copy of the suspicious adapter or model without the selected channels and heads.

    Args: access "adapter" zeroes LoRA rows and columns, "full" draws channels anew with `seed`; suspicious, the folder
        of either; masks {module: [channels]}; folder to write to; heads [n_layers, n_heads].
    """
    if access == "adapter":
        zero_adapter(suspicious, folder, masks, load_config(profile.model), heads)
        return
    reinitialise(suspicious, folder, masks, load_config(profile.model), seed, heads)


def zero_adapter(
    folder_in: Path | str,
    folder_out: Path | str,
    masks: Masks,
    config: PretrainedConfig,
    heads: BoolTensor | None = None,
) -> None:
    """Write a copy of a PEFT adapter without the LoRA update of the selected channels and heads.

    The paper zeroes rows of A and columns of B in W + A Bᵀ; PEFT's W + B A names the same two the other way round.

    Args: masks {module: [channels], True = zeroed}; config of the base model; heads [n_layers, n_heads].
    Raises: LabError when a mask fits no LoRA matrix of the adapter, or as `read_adapter`; nothing is written then.
    """
    folder_in, folder_out = Path(folder_in), Path(folder_out)
    if folder_in.resolve() == folder_out.resolve():
        raise LabError(f"cannot overwrite {folder_in} while reading it: the suppressed adapter needs its own folder")
    tensors, slots = read_adapter(folder_in, matrix_sizes(config)).tensors, matrices(config)
    for module, mask in _all_masks(masks, config, heads).items():
        side = slots[module].side
        name = f"{PREFIX}{module}.{'lora_B' if side == ROWS else 'lora_A'}.weight"
        if name not in tensors:
            raise LabError(f"cannot suppress channels of {module}: the adapter in {folder_in} has no LoRA there")
        _check_length(module, mask, tensors[name].shape[side])
        tensors[name] = tensors[name].masked_fill(_along(mask, side), 0)
    folder_out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder_out / ADAPTER_FILE, metadata={"format": "pt"})
    for name in (ADAPTER_CONFIG, FORMAT_FILE):
        if (folder_in / name).is_file():
            shutil.copy(folder_in / name, folder_out)


@torch.no_grad()
def reinitialise(
    folder_in: Path | str,
    folder_out: Path | str,
    masks: Masks,
    config: PretrainedConfig,
    seed: int,
    heads: BoolTensor | None = None,
) -> None:
    """Write a copy of a model whose selected channels and heads are drawn anew, as if it had just been created.

    Weights come from the Xavier-uniform distribution of the WHOLE matrix (a fused one is one, as in PyTorch's own
    attention), the bias of an output is 0 again; every other number stays as it was, bit by bit. A matrix's draw
    depends on the seed, its name and its mask only. The model is rewritten shard by shard: peak memory is one shard,
    twice.

    Args: masks {module: [channels], True = drawn anew}; config of the model; heads [n_layers, n_heads].
    Raises: LabError when a mask fits no matrix of the model; nothing is written then.
    """
    slots, shapes, chosen = matrices(config), dict(stored(folder_in)), {}
    for module, mask in _all_masks(masks, config, heads).items():
        weight = find(f"{module}.weight", shapes, folder_in)
        _check_length(module, mask, shapes[weight][slots[module].axis])
        chosen[weight.removesuffix(".weight")] = (slots[module], mask)

    def redraw(name: str, tensor: Tensor) -> Tensor:
        """One tensor of the checkpoint, its selected channels drawn anew."""
        place, _, kind = name.rpartition(".")
        slot, mask = chosen.get(place, (None, None))
        if slot is None or not mask.any():
            return tensor
        if kind == "bias":
            return tensor.masked_fill(mask, 0) if slot.side == ROWS else tensor
        return _redrawn(tensor, mask, slot.axis, f"{seed}/{slot.module}")

    rewrite(folder_in, folder_out, redraw)


def _redrawn(weight: Tensor, mask: BoolTensor, axis: int, seed: str) -> Tensor:
    generator = Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
    bound = (6 / sum(weight.shape)) ** 0.5
    shape = list(weight.shape)
    shape[axis] = int(mask.sum())
    fresh = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(weight.dtype)
    return weight.clone().index_copy_(axis, mask.nonzero().flatten(), fresh)


def _all_masks(masks: Masks, config: PretrainedConfig, heads: BoolTensor | None) -> dict[str, BoolTensor]:
    """Channel masks of MLP and attention together, modules checked."""
    unknown = masks.keys() - matrices(config).keys()
    if unknown:
        raise LabError(f"no such matrix in this model: {', '.join(sorted(unknown))}")
    if heads is None:
        return dict(masks)
    return dict(masks) | {module: mask for module, mask in head_masks(config, heads).items() if mask.any()}


def _check_length(module: str, mask: BoolTensor, channels: int) -> None:
    if len(mask) != channels:
        raise LabError(f"the mask of {module} has {len(mask)} channels, the matrix {channels}: scored another model?")


def _along(mask: BoolTensor, axis: int) -> Tensor:
    return mask[None, :] if axis == COLUMNS else mask[:, None]
