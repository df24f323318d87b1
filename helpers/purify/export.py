"""The purified model in the form in which the suspicious one came: its files, its dtype, its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.core.errors import LabError
from helpers.core.paths import MANIFEST
from helpers.model.adapters import ADAPTER_FILE, is_adapter
from helpers.model.load import load_base
from helpers.model.shards import whole_or_nothing
from helpers.purify.case import Case

LEFT_BEHIND = (".bin", ".pt", ".pth", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")  # weights in other forms


def export(case: Case, made: Path, folder: Path) -> None:
    """Write the purified model to `folder`, in the place of an earlier one.

    Args:
        made: folder of what the last step made.
        folder: to write to.
    """
    if folder.exists():
        shutil.rmtree(folder)
    with whole_or_nothing(folder) as partial:
        if is_adapter(case.suspect.folder) != is_adapter(made):  # an adapter that was merged is a whole model now
            shutil.copytree(made, partial, dirs_exist_ok=True)
        else:
            _write_like(case, made, partial)
        (partial / MANIFEST).unlink(missing_ok=True)


def _write_like(case: Case, made: Path, folder: Path) -> None:
    """The tensors of `made` under the names, in the dtypes and in the files of the suspicious model."""
    suspect = case.suspect.folder
    tensors = load_file(made / ADAPTER_FILE) if is_adapter(made) else _weights(case, made)
    for file in sorted(suspect.iterdir()):
        if file.suffix == ".safetensors":
            save_file(_like(file, tensors), folder / file.name, metadata={"format": "pt"})
        elif file.is_file() and file.suffix not in LEFT_BEHIND:
            shutil.copy2(file, folder / file.name)


def _weights(case: Case, made: Path) -> dict[str, Tensor]:
    return load_base(case.profile.model, path=str(made)).state_dict()


def _like(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a file of the suspicious model holds, with the purified numbers."""
    found = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            # some checkpoints leave out the first part of a name, and some hold buffers that no model trains
            match = next((known for known in tensors if known == name or known.endswith(f".{name}")), None)
            old = stored.get_tensor(name)
            if match is None and old.is_floating_point() and old.ndim > 1 and old.shape[0] > 1:
                raise LabError(f"{file.name} holds {name}, which the purified model does not have")
            found[name] = old if match is None else tensors[match].to("cpu", old.dtype).contiguous().clone()
    return found
