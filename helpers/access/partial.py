"""Adapter access to an adapter of any shape: what it leaves out is the base's own, and nothing of it can be suppressed.

The lab's own adapters change every matrix inside the layers. Those of others may leave some out. Their channels are
then scored by the matrices that the adapter does change, and a matrix that it leaves out adds nothing to a score.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from helpers.access.adapter import AdapterAccess, zero_adapter
from helpers.access.deltas import Folders, GramOf, adapter_pairs
from helpers.access.masks import Masks, with_heads
from helpers.model.adapters import read_adapter
from helpers.model.architecture import Slot, matrix_sizes
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base
from helpers.model.lora import with_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import BoolTensor, Tensor


class PartialAdapterAccess(AdapterAccess):
    """An adapter over some matrices of the clean base may be edited."""

    def start_variant(self, suspicious: Path | str, seed: int) -> PeftModel:
        """The suspicious adapter, trained on, over its base in 4 bits, whatever it adapts."""
        return with_adapter(load_base(self.profile.model, four_bit=True), suspicious, trainable=True)

    def variant_pairs(self, poisoned: Folders, clean: Folders) -> GramOf:
        """Of low-rank differences; of a matrix without them, zeros."""
        gram_of, adapted = adapter_pairs(poisoned, clean), set(read_adapter(poisoned[0]).modules)
        sizes, n = matrix_sizes(load_config(self.profile.model)), len(poisoned)

        def found(slot: Slot) -> Tensor:
            """The Gram [N, N, channels] of a matrix that the adapter may leave out."""
            if slot.module in adapted:
                return gram_of(slot)
            return torch.zeros(n, n, sizes[slot.module][slot.side], dtype=torch.float64)

        return found

    def suppress(
        self, suspicious: Path | str, masks: Masks, seed: int, folder: Path | str, heads: BoolTensor | None = None
    ) -> None:
        """Zero the adapter's update of the selected channels and heads, as far as it has one."""
        config, adapted = load_config(self.profile.model), set(read_adapter(suspicious).modules)
        chosen = with_heads(masks, config, heads)
        zero_adapter(suspicious, folder, {module: mask for module, mask in chosen.items() if module in adapted}, config)
