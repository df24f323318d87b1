"""Adapter access: attacker and defender train one LoRA adapter, and the base's own weights stay as they are.

The suspicious update is B A, so a channel's share of it vanishes with one row of `lora_B` (matrices whose channels are
rows) or one column of `lora_A` (columns), and the base is left.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from helpers.access.deltas import Factors, Folders, GramOf, adapter_pairs, adapter_update, lora_factors
from helpers.access.interface import Access
from helpers.access.masks import Masks, check_length, with_heads
from helpers.core.errors import LabError
from helpers.model.adapters import ADAPTER_FILE, PREFIX, read_adapter, require_matrices
from helpers.model.architecture import COLUMNS, ROWS, Slot, attention_slots, matrices, matrix_sizes, mlp_slots
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base, save
from helpers.model.lora import adapter_tensors, add_adapter, new_adapter, save_adapter, with_adapter
from helpers.model.shards import ADAPTER_CONFIG, FORMAT_FILE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import BoolTensor, Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from helpers.core.profile import Profile


class AdapterAccess(Access):
    """An adapter over the clean base may be edited."""

    name = "adapter"
    edits_weights = False
    low_rank_variants = True

    def start(self, seed: int) -> PeftModel:
        """A fresh adapter over the base."""
        return new_adapter(load_base(self.profile.model), self.profile.lora, seed)

    def resume(self, folder: Path | str) -> PeftModel:
        """The adapter in `folder` over its frozen base."""
        return with_adapter(load_base(self.profile.model), folder, trainable=True)

    def start_copy(self, suspicious: Path | str, seed: int) -> PeftModel:
        """The suspicious adapter, trained on."""
        return self.resume(suspicious)

    def save(self, model: PeftModel, folder: Path | str) -> None:
        """Write the adapter alone."""
        save(model, folder)

    def start_variant(self, suspicious: Path | str, seed: int) -> PeftModel:
        """The suspicious adapter, trained on, over its base in 4 bits."""
        require_matrices(suspicious, self._scored_matrices())
        return with_adapter(load_base(self.profile.model, four_bit=True), suspicious, trainable=True)

    def variant_starts(self, suspicious: Path | str, seeds: Sequence[int]) -> tuple[PeftModel, list[dict[str, Tensor]]]:
        """The suspicious adapter is where all variants start."""
        model = self.start_variant(suspicious, seeds[0])
        return model, [adapter_tensors(model)] * len(seeds)

    def save_variant(self, model: PeftModel, suspicious: Path | str, folder: Path | str) -> None:
        """Write the adapter, trained on."""
        save(model, folder)

    def load_variant(self, suspicious: Path | str, folder: Path | str) -> PreTrainedModel:
        """The variant's adapter merged into the base: it holds the suspicious one's update as well."""
        return with_adapter(load_base(self.profile.model), folder).merge_and_unload().eval()

    def suppress(
        self, suspicious: Path | str, masks: Masks, seed: int, folder: Path | str, heads: BoolTensor | None = None
    ) -> None:
        """Zero the adapter's update of the selected channels and heads, for which no number is drawn."""
        zero_adapter(suspicious, folder, masks, load_config(self.profile.model), heads)

    def add_update(self, suspicious: Path | str, adapter: Path | str, weight: float, folder: Path | str) -> None:
        """Write one adapter whose rank is the sum of both."""
        add_adapters(self.profile, (suspicious, adapter), (1.0, weight), folder)

    def variant_pairs(self, poisoned: Folders, clean: Folders) -> GramOf:
        """Of low-rank differences, none of which is formed."""
        return adapter_pairs(poisoned, clean)

    def own_update(self, suspicious: Path | str) -> GramOf:
        """Of the suspicious adapter: no base is needed to tell what it adds."""
        return adapter_update(suspicious)

    def edited_matrices(self, folder: Path | str) -> dict[str, Factors]:
        """The low-rank updates."""
        return lora_factors(folder)

    def edited_channels(self, folder: Path | str, slot: Slot) -> Tensor:
        """The rows of B, or the columns of A."""
        factors = lora_factors(folder)[slot.module]
        return factors.B if slot.side == ROWS else factors.A.T

    def _scored_matrices(self) -> list[str]:
        """The matrices whose channels a signature scores: the MLP's, the attention's too where heads are suppressed."""
        config = load_config(self.profile.model)
        layers = mlp_slots(config) + (attention_slots(config) if self.settings.suppress.heads else [])
        return [slot.module for layer in layers for slot in layer]


def zero_adapter(
    folder_in: Path | str,
    folder_out: Path | str,
    masks: Masks,
    config: PretrainedConfig,
    heads: BoolTensor | None = None,
) -> None:
    """Write a copy of a PEFT adapter without the LoRA update of the selected channels and heads.

    The paper zeroes rows of A and columns of B in W + A Bᵀ; PEFT's W + B A names the same two the other way round.

    Args:
        folder_in: of the adapter.
        folder_out: to write the copy to.
        masks: {module: [channels], True = zeroed}.
        config: of the base model.
        heads: [n_layers, n_heads], True = zeroed.

    Raises:
        LabError: a mask that fits no LoRA matrix of the adapter, or as `read_adapter`; nothing is written then.
    """
    folder_in, folder_out = Path(folder_in), Path(folder_out)
    if folder_in.resolve() == folder_out.resolve():
        raise LabError(f"cannot overwrite {folder_in} while reading it: the suppressed adapter needs its own folder")
    tensors, slots = read_adapter(folder_in, matrix_sizes(config)).tensors, matrices(config)
    for module, mask in with_heads(masks, config, heads).items():
        side = slots[module].side
        name = f"{PREFIX}{module}.{'lora_B' if side == ROWS else 'lora_A'}.weight"
        if name not in tensors:
            raise LabError(f"cannot suppress channels of {module}: the adapter in {folder_in} has no LoRA there")
        check_length(module, mask, tensors[name].shape[side])
        tensors[name] = tensors[name].masked_fill(_along(mask, side), 0)
    folder_out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder_out / ADAPTER_FILE, metadata={"format": "pt"})
    for name in (ADAPTER_CONFIG, FORMAT_FILE):
        if (folder_in / name).is_file():
            shutil.copy(folder_in / name, folder_out)


def add_adapters(
    profile: Profile, adapters: Sequence[Path | str], weights: Sequence[float], folder: Path | str
) -> None:
    """Write the weighted sum of adapters of one base as one adapter, whose rank is the sum of theirs.

    Every scale goes into the factors: the sum is a plain adapter of scale 1, whatever its parts were.

    Args:
        profile: names the base.
        adapters: their folders, at least two.
        weights: one for each; a negative one takes an adapter off.
        folder: to write the sum to.

    Raises:
        LabError: an adapter that is more than scale * B @ A, or does not fit the base.
    """
    model = with_adapter(load_base(profile.model), adapters[0])
    for i, further in enumerate(adapters[1:], start=1):
        add_adapter(model, further, f"further{i}")
    names = list(model.peft_config)
    for name, config in model.peft_config.items():
        _name_matrices(model, name, config)
        config.use_rslora = False  # PEFT hands it on to the sum, where the root of the rank would scale it once more
    model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
    save_adapter(model.peft_config["sum"], adapter_tensors(model, "sum"), folder)


def _name_matrices(model: PeftModel, name: str, config: LoraConfig) -> None:
    """Let an adapter's settings name its matrices one by one: PEFT joins neither patterns nor choices of layers."""
    base = model.get_base_model()
    config.target_modules = {
        place for place, layer in base.named_modules() if isinstance(layer, LoraLayer) and name in layer.lora_A
    }
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _along(mask: BoolTensor, axis: int) -> Tensor:
    return mask[None, :] if axis == COLUMNS else mask[:, None]
