"""The purified model in the form in which the suspicious one came: its files, its dtype, its tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.core.disk import read_json, settle, whole_or_nothing, write_json
from helpers.core.paths import MANIFEST
from helpers.model.adapters import ADAPTER_FILE, is_adapter
from helpers.model.load import load_base
from helpers.model.shards import ADAPTER_CONFIG, layout, read, stored_name, write
from helpers.purify.case import Case

LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")  # other weights
BASE = "base_model_name_or_path"  # of an adapter's settings


def export(case: Case, made: Path, folder: Path) -> None:
    """Write the purified model to `folder`, in the place of an earlier one.

    Args:
        made: folder of what the last step made.
        folder: to write to.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with whole_or_nothing(folder) as partial:
        if case.suspect.access == "full":
            _copy_beside(case.suspect.folder, partial)
            _write_weights(case, made, partial)
        elif is_adapter(made):
            _copy_beside(case.suspect.folder, partial)
            _write_adapter(case.suspect.folder, made, partial)
        else:  # other merges than the linear one leave a whole model
            shutil.copytree(made, partial, dirs_exist_ok=True)
        settle(partial)


def _copy_beside(suspect: Path, folder: Path) -> None:
    """All files of the suspicious model but weights: settings, tokenizer, licence; no manifest of a stage."""
    for file in sorted(suspect.iterdir()):
        if file.is_file() and file.suffix not in LEFT_BEHIND and file.name != MANIFEST:
            shutil.copy2(file, folder)


def _write_adapter(suspect: Path, made: Path, folder: Path) -> None:
    """The adapter in the dtype of the suspicious one; a merged one has ranks and settings of its own."""
    before, tensors = load_file(suspect / ADAPTER_FILE), load_file(made / ADAPTER_FILE)
    dtype = next(iter(before.values())).dtype
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if _shapes(before) != _shapes(tensors):
        base = read_json(suspect / ADAPTER_CONFIG).get(BASE)
        write_json(folder / ADAPTER_CONFIG, read_json(made / ADAPTER_CONFIG) | {BASE: base})


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _write_weights(case: Case, made: Path, folder: Path) -> None:
    """The weights in the files, under the names and in the dtypes of the suspicious model; what it alone has, as is."""
    suspect, files = case.suspect.folder, layout(case.suspect.folder)
    names = {name for inside in files.values() for name in inside}
    purified = load_base(case.profile.model, path=str(made)).state_dict()
    tensors = {stored_name(name, names): tensor for name, tensor in purified.items()}

    def like(name: str) -> Tensor:
        """A tensor of the suspicious model with the purified numbers."""
        old = read(suspect, name)
        return tensors[name].to("cpu", old.dtype).contiguous().clone() if name in tensors else old

    write(folder, files, like)
