"""What poisoning alone changed: Δ = θᵇᵈ − θᶜˡᵉᵃⁿ (Eq. 1), kept only as inner products between variants.

Eq. 2 needs nothing of a delta but lengths and angles, channel by channel, and both follow from the Gram matrix
G[i, l, j] = ⟨Δ_i[j], Δ_l[j]⟩. For LoRA, Δ = B A − B′ A′ has rank 2r, so with Δ_i = L_i R_i row j gives
L_i[j] (R_i R_lᵀ) L_l[j]ᵀ: a 2r × 2r matrix for each pair of variants instead of a full-size delta for each
variant. For full models the deltas are streamed from safetensors in blocks of rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.core.errors import LabError
from helpers.model.adapters import PREFIX, read_adapter
from helpers.model.architecture import COLUMNS, ROWS, Slot
from helpers.model.shards import open_slice

Folders = Sequence[Path | str]
GramOf = Callable[[Slot], Tensor]
CHANNELS = 256  # channels whose inner products are taken at a time: what lies between fits the processor's cache
BLOCKS = 128  # row blocks a streamed tensor is read in: all 2N of them together stay far below one tensor


class Factors(NamedTuple):
    """A low-rank update scale * B @ A of a matrix [out, in], however that is stored: A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor
    scale: float = 1.0


def lora_factors(folder: Path | str) -> dict[str, Factors]:
    """The LoRA update of each adapted matrix in a PEFT adapter folder.

    Returns:
        {module name without PEFT's prefix: Factors}.

    Raises:
        LabError: the folder holds no safetensors LoRA, or a variant whose update is not scale * B @ A.
    """
    adapter = read_adapter(folder)
    parts = {
        module: [adapter.tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB"] for module in adapter.modules
    }
    return {module: Factors(*pair, adapter.scale(module)) for module, pair in parts.items()}


def lora_delta(bd: Factors, clean: Factors) -> Factors:
    """The difference of two LoRA updates, itself a LoRA update of rank 2r. Implements Eq. (1), BD-VAX §4.2.

    Twins start from the same adapter, so B A − B′ A′ subtracts nearly equal matrices. Written around their mean,
    (B − B′) (A + A′)/2 + (B + B′)/2 (A − A′), the subtraction happens in the factors, before anything is rounded.

    Returns:
        Factors in float64, A [2r, in], B [out, 2r].

    Raises:
        LabError: the shapes differ.
    """
    if bd.A.shape != clean.A.shape or bd.B.shape != clean.B.shape:
        raise LabError(
            f"twins must share one LoRA shape: A {list(bd.A.shape)} and {list(clean.A.shape)}, "
            f"B {list(bd.B.shape)} and {list(clean.B.shape)}"
        )
    a, a_clean = bd.A.double(), clean.A.double()
    b, b_clean = bd.B.double() * bd.scale, clean.B.double() * clean.scale
    return Factors(torch.cat([(a + a_clean) / 2, a - a_clean]), torch.cat([b - b_clean, (b + b_clean) / 2], dim=1))


def factor_gram(updates: Sequence[Factors], axis: int) -> Tensor:
    """Inner products between low-rank updates, channel by channel, without forming one of them.

    Args:
        updates: of one matrix, equal shapes.
        axis: 0 where rows of the matrix are channels, 1 where columns are.

    Returns:
        Gram [N, N, channels], float64.
    """
    left = torch.stack([update.B.double() * update.scale for update in updates])
    right = torch.stack([update.A.double() for update in updates])
    if axis == COLUMNS:
        left, right = right.mT, left.mT
    inner = torch.einsum("ipx,lqx->iplq", right, right)
    pieces = [torch.einsum("ijp,iplq,ljq->ilj", rows, inner, rows) for rows in left.split(CHANNELS, dim=1)]
    return torch.cat(pieces, dim=-1)


def lora_gram(bd: Sequence[Factors], clean: Sequence[Factors], axis: int) -> Tensor:
    """Inner products ⟨Δ_i,j, Δ_l,j⟩ of N pairs of LoRA variants of one matrix.

    Args:
        bd, clean: N updates each, pair i at position i.
        axis: as in `factor_gram`.

    Returns:
        Gram [N, N, channels], float64.
    """
    return factor_gram([lora_delta(*pair) for pair in zip(bd, clean, strict=True)], axis)


def full_gram(bd: Folders, clean: Folders, tensor_name: str, axis: int) -> Tensor:
    """Inner products ⟨Δ_i,j, Δ_l,j⟩ of N pairs of full models for one weight, streamed from safetensors.

    Peak memory stays below 2N + 2 times the tensor, the files' mapped pages included.

    Args:
        bd, clean: N model folders each.
        tensor_name: of the weight, as the checkpoint calls it.
        axis: as in `factor_gram`.

    Returns:
        Gram [N, N, channels], float64.

    Raises:
        LabError: a folder lacks the tensor or holds it in another shape.
    """
    with ExitStack() as files:
        folders = [Path(folder) for pair in zip(bd, clean, strict=True) for folder in pair]
        slices = [open_slice(folder, tensor_name, files) for folder in folders]
        shapes = {tuple(piece.get_shape()) for piece in slices}
        if len(shapes) > 1:
            raise LabError(f"the variants hold {tensor_name} in different shapes: {sorted(shapes)}")
        shape = shapes.pop()
        gram = torch.zeros(len(bd), len(bd), shape[axis], dtype=torch.float64)
        for rows, deltas in _delta_blocks(slices, shape[0]):
            if axis == ROWS:
                gram[..., rows] = _gram(deltas)
            else:
                gram += _gram(deltas.mT)
        return gram


def weight_gram(weight: Tensor | Factors, axis: int) -> Tensor:
    """Squared channel norms of a single matrix, in the same form as a Gram of N = 1.

    Args:
        weight: matrix [out, in] or a low-rank update.
        axis: as in `factor_gram`.

    Returns:
        Gram [1, 1, channels], float64.
    """
    if isinstance(weight, Factors):
        return factor_gram([weight], axis)
    return torch.linalg.vector_norm(weight.detach().double(), dim=1 - axis).square()[None, None]


def slot_gram(weight: Tensor | Factors, slot: Slot) -> Tensor:
    """`weight_gram` along the channels of a slot's matrix, whether that lies in the checkpoint as it is or transposed.

    Args:
        weight: the matrix as it is stored, or a low-rank update, which PEFT keeps as B A = [out, in] for either.
        slot: the matrix, and which side of it the channels are.
    """
    return weight_gram(weight, slot.side if isinstance(weight, Factors) else slot.axis)


def adapter_pairs(bd_folders: Folders, clean_folders: Folders) -> GramOf:
    """N pairs of PEFT adapters as a function from a slot to the Gram [N, N, channels] of its whole matrix.

    Raises:
        LabError: the pairs are incomplete or, later, when an adapter lacks the matrix asked for.
    """
    _check_pairs(bd_folders, clean_folders)
    bd, clean = [[lora_factors(folder) for folder in folders] for folders in (bd_folders, clean_folders)]
    return lambda slot: lora_gram(*[[_factors_of(slot, f) for f in member] for member in (bd, clean)], slot.side)


def adapter_update(folder: Path | str) -> GramOf:
    """One PEFT adapter as a function from a slot to the Gram [1, 1, channels] of what it adds to that matrix.

    Args:
        folder: of the adapter.

    Raises:
        LabError: as `lora_factors` or, later, when the adapter lacks the matrix asked for.
    """
    factors = lora_factors(folder)
    return lambda slot: slot_gram(_factors_of(slot, factors), slot)


def model_pairs(bd_folders: Folders, clean_folders: Folders) -> GramOf:
    """N pairs of full models as a function from a slot to the Gram [N, N, channels] of its matrix, read when asked for.

    Raises:
        LabError: the pairs are incomplete or, later, when a model lacks the matrix asked for.
    """
    _check_pairs(bd_folders, clean_folders)
    return lambda slot: full_gram(bd_folders, clean_folders, f"{slot.module}.weight", slot.axis)


def _check_pairs(bd_folders: Folders, clean_folders: Folders) -> None:
    if not bd_folders or len(bd_folders) != len(clean_folders):
        raise LabError(
            f"variants come in pairs: got {len(bd_folders)} backdoored and {len(clean_folders)} clean folders; "
            "notebook 03_train_vaccines makes them"
        )


def _factors_of(slot: Slot, factors: Mapping[str, Factors]) -> Factors:
    if slot.module not in factors:
        adapted = sorted({module.rpartition(".")[2] for module in factors})
        raise LabError(f"the adapter has no LoRA on {slot.module}; it adapts {', '.join(adapted)}")
    return factors[slot.module]


def _delta_blocks(slices: Sequence, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Eq. (1) by blocks of rows: [N, block, in] in float64; `slices` alternate backdoored and clean."""
    step = math.ceil(rows / BLOCKS)
    for block in (slice(start, start + step) for start in range(0, rows, step)):
        bd, clean = (torch.stack([piece[block].double() for piece in side]) for side in (slices[0::2], slices[1::2]))
        yield block, bd - clean


def _gram(deltas: Tensor) -> Tensor:
    """[N, channels, values] -> [N, N, channels]"""
    return torch.einsum("ijx,ljx->ilj", deltas, deltas)
