"""Full access: attacker and defender may change every weight of the model.

There is no clean base to fall back on, so what is suppressed is drawn anew, as at the birth of a model, and
fine-tuning gives it a new meaning. Vaccines probe the suspicious model by LoRA, or train all its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import BoolTensor, Generator, Tensor

from helpers.access.deltas import Folders, GramOf, adapter_pairs, model_pairs
from helpers.access.interface import Access
from helpers.access.masks import Masks, check_length, with_heads
from helpers.model.adapters import is_adapter
from helpers.model.architecture import ROWS, Slot, channel_axes, matrices
from helpers.model.checkpoint import load_config, local_folder
from helpers.model.load import load_base, save
from helpers.model.lora import adapter_tensors, new_adapter, with_adapter
from helpers.model.shards import DELTA, find, open_slice, read, rewrite, stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class FullAccess(Access):
    """All weights may be edited."""

    name = "full"
    edits_weights = True

    @property
    def low_rank_variants(self) -> bool:
        """Whether `vaccine_weights` asks for LoRA probes."""
        return self.settings.vaccine_weights == "lora"

    def start(self, seed: int) -> PreTrainedModel:
        """All weights of the base, none of which is drawn."""
        return load_base(self.profile.model)

    def resume(self, folder: Path | str) -> PreTrainedModel:
        """All weights of the model in `folder`."""
        return load_base(self.profile.model, path=str(folder))

    def start_copy(self, suspicious: Path | str, seed: int) -> PeftModel:
        """Fresh LoRA probes over the suspicious weights, which `save` merges into them."""
        return new_adapter(self.resume(suspicious), self.profile.lora, seed)

    def save(self, model: PreTrainedModel | PeftModel, folder: Path | str) -> None:
        """Write all weights; probes over them are merged into them."""
        save(model.merge_and_unload() if isinstance(model, PeftModel) else model, folder)

    def start_variant(self, suspicious: Path | str, seed: int) -> PreTrainedModel | PeftModel:
        """Fresh LoRA probes over the suspicious weights in 4 bits, or all weights."""
        if self.low_rank_variants:
            return new_adapter(self._in_4_bits(suspicious), self.profile.lora, seed)
        return self.resume(suspicious)

    def variant_starts(self, suspicious: Path | str, seeds: Sequence[int]) -> tuple[PeftModel, list[dict[str, Tensor]]]:
        """Fresh probes of each seed over one base."""
        base, starts = self._in_4_bits(suspicious), {}
        for seed in dict.fromkeys(seeds):
            model = new_adapter(base, self.profile.lora, seed)
            starts[seed] = adapter_tensors(model)
            base = model.unload()
        return new_adapter(base, self.profile.lora, seeds[0]), [starts[seed] for seed in seeds]

    def save_variant(self, model: PreTrainedModel | PeftModel, suspicious: Path | str, folder: Path | str) -> None:
        """Write the probes or, where all weights were trained, the change of each MLP and attention matrix.

        A change is kept in bfloat16: it is small beside its weight, so 16 bits tell it far better than they would tell
        the changed weight.
        """
        if self.low_rank_variants:
            save(model, folder)
        else:
            _save_delta(model, suspicious, folder)

    def load_variant(self, suspicious: Path | str, folder: Path | str) -> PreTrainedModel:
        """The suspicious model with the variant's probes or change added to its weights."""
        model = self.resume(suspicious)
        if is_adapter(folder):
            return with_adapter(model, folder).merge_and_unload().eval()
        return _with_delta(model, folder)

    def suppress(
        self, suspicious: Path | str, masks: Masks, seed: int, folder: Path | str, heads: BoolTensor | None = None
    ) -> None:
        """Draw the selected channels and heads anew."""
        reinitialize(suspicious, folder, masks, load_config(self.profile.model), seed, heads)

    def add_update(self, suspicious: Path | str, adapter: Path | str, weight: float, folder: Path | str) -> None:
        """Write all weights, the update merged into them."""
        adapted = with_adapter(self.resume(suspicious), adapter)
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(weight)
        self.save(adapted, folder)

    def variant_pairs(self, poisoned: Folders, clean: Folders) -> GramOf:
        """Of low-rank differences, or of changes that are streamed from the disk."""
        return (adapter_pairs if self.low_rank_variants else model_pairs)(poisoned, clean)

    def own_update(self, suspicious: Path | str) -> GramOf:
        """Of the difference to the clean base, without which nothing tells what the attack has changed."""
        return model_pairs([suspicious], [local_folder(self.profile.model)])

    def edited_matrices(self, folder: Path | str) -> dict[str, Tensor]:
        """The weights as they are stored."""
        return {module: read(folder, f"{module}.weight") for module in matrices(load_config(self.profile.model))}

    def edited_channels(self, folder: Path | str, slot: Slot) -> Tensor:
        """The weights of each channel."""
        return read(folder, f"{slot.module}.weight").movedim(slot.axis, 0)

    def _in_4_bits(self, suspicious: Path | str) -> PreTrainedModel:
        return load_base(self.profile.model, four_bit=True, path=str(suspicious))


@torch.no_grad()
def reinitialize(
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

    Args:
        folder_in: of the model.
        folder_out: to write the copy to.
        masks: {module: [channels], True = drawn anew}.
        config: of the model.
        seed: of the new numbers.
        heads: [n_layers, n_heads], True = drawn anew.

    Raises:
        LabError: a mask that fits no matrix of the model; nothing is written then.
    """
    slots, shapes, chosen = matrices(config), dict(stored(folder_in)), {}
    for module, mask in with_heads(masks, config, heads).items():
        weight = find(f"{module}.weight", shapes, folder_in)
        check_length(module, mask, shapes[weight][slots[module].axis])
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


def _save_delta(model: PreTrainedModel, origin: Path | str, folder: Path | str) -> None:
    """Write what training changed in the matrices that have channels, read beside the origin one matrix at a time."""
    deltas = {}
    for name in (f"{module}.weight" for module in channel_axes(model.config)):
        with ExitStack() as files:
            before = open_slice(origin, name, files)[:]
        deltas[name] = (model.get_parameter(name).detach().cpu().float() - before.float()).bfloat16()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(deltas, Path(folder) / DELTA, metadata={"format": "pt"})


@torch.no_grad()
def _with_delta(model: PreTrainedModel, folder: Path | str) -> PreTrainedModel:
    for name, delta in load_file(Path(folder) / DELTA).items():
        weight = model.get_parameter(name)
        weight.add_(delta.to(weight))
    return model
