"""What a merge reads of a checkpoint, and what goes along with the weights."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from helpers.core.errors import LabError
from helpers.model.shards import (
    BESIDE,
    CONSTANTS,
    INDEX,
    TOKENIZER,
    Folder,
    layout,
    read,
    read_config,
    stored,
    stored_name,
    tied,
)


def merged_files(folder: Folder) -> dict[str, list[str]]:
    """{file: its tensors} of a checkpoint, without what some writers add: constants, a copied head."""
    needless = (*CONSTANTS, *_copied_heads(folder))
    files = {file: [name for name in names if not name.endswith(needless)] for file, names in layout(folder).items()}
    return {file: names for file, names in files.items() if names}


def merged_names(folder: Folder) -> list[str]:
    """The names of the tensors in `merged_files`."""
    return [name for names in merged_files(folder).values() for name in names]


def read_finite(folder: Folder, name: str) -> Tensor:
    """A tensor of a checkpoint, mapped from its file.

    Raises:
        LabError: a number in it is NaN or infinite.
    """
    tensor = read(folder, name)
    # a sum is fast and tells in nearly every case; that of large 16-bit numbers may overflow
    if not (tensor.sum().isfinite() or tensor.isfinite().all()):
        raise LabError(f"{folder} holds NaN or infinite numbers in {name}: the checkpoint is damaged, copy it anew")
    return tensor


def copy_beside(model: Folder, folder: Path) -> None:
    """Copy what belongs to a model beside its weights and their index."""
    for name in (*BESIDE, *TOKENIZER):
        if name != INDEX and (Path(model) / name).is_file():
            shutil.copy(Path(model) / name, folder)


def _copied_heads(folder: Folder) -> list[str]:
    """Heads that hold the numbers of the embedding beside them; another one is the model's own, whatever a config says.

    A head that is stored alone stands for the embedding as well and is none of these.
    """
    names = dict(stored(folder))
    pairs = [(head, stored_name(embedding, names)) for head, embedding in tied(read_config(folder)).items()]
    both = [(head, embedding) for head, embedding in pairs if head in names and embedding in names]
    return [head for head, embedding in both if _equal(read(folder, head), read(folder, embedding))]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
