"""What cannot be merged is refused before anything is written."""

from collections.abc import Sequence
from pathlib import Path

import torch

from helpers.core.errors import LabError
from helpers.defenses.conflict.merge.blocks import split_blocks
from helpers.defenses.conflict.merge.checkpoints import merged_names
from helpers.model.shards import Folder, read, read_config, stored, stored_name

KINDS = (  # what two configs must have in common: heads do not show in the shapes of weights
    ("architecture", "model_type"),
    ("vocabulary", "vocab_size"),
    ("width", "hidden_size"),
    ("number of heads", "num_attention_heads"),
    ("number of key heads", "num_key_value_heads"),
)


def check_share(t: float) -> None:
    """Refuse a share t outside [0, 1].

    Raises:
        LabError: with the share.
    """
    if not 0 <= t <= 1:
        raise LabError(f"t = {t} should be from 0 to 1, the conflict model's share (negate goes beyond 1)")


def check_compatible(models: Sequence[Folder], folder: Folder) -> None:
    """Refuse to overwrite an input, and models of two architectures or vocabularies.

    Args:
        models: folders of whole models; the first is what the others are compared with.
        folder: the one to write to.

    Raises:
        LabError: the model and what it does not share.
    """
    if Path(folder).resolve() in [Path(model).resolve() for model in models]:
        raise LabError(f"cannot overwrite {folder} while reading it: the merged model needs its own folder")
    first, *others = [read_config(model) for model in models]
    for model, config in zip(models[1:], others, strict=True):
        for what, key in KINDS:
            found, expected = getattr(config, key, None), getattr(first, key, None)
            if found != expected:
                raise LabError(
                    f"{model} has another {what} than {models[0]} ({key} {found}, not {expected}): "
                    "only models trained from one base can be merged"
                )


def check_alike(models: Sequence[Folder], folder: Folder) -> None:
    """Refuse models that are not the same tensors in the same shapes, and what `check_compatible` refuses.

    Args:
        models, folder: as in `check_compatible`.

    Raises:
        LabError: the first tensor that differs.
    """
    check_compatible(models, folder)
    names, shapes = merged_names(models[0]), dict(stored(models[0]))
    for model in models[1:]:
        others, theirs = dict(stored(model)), set(merged_names(model))
        expected = {stored_name(name, theirs): name for name in names}
        odd = sorted(expected.keys() ^ theirs)
        if odd:
            lacking = model if odd[0] in expected else models[0]
            raise LabError(
                f"{lacking} lacks {odd[0]} and the other model has it: only models of one shape can be merged"
            )
        for found, name in expected.items():
            if shapes[name] != others[found]:
                raise LabError(f"{name} has shape {others[found]} in {model} and {shapes[name]} in {models[0]}")


def check_different(model: Folder, other: Folder) -> None:
    """Refuse equal models of one shape: their task vector is zero, and there is no arc between them.

    Raises:
        LabError: no number differs.
    """
    for name in merged_names(model):
        if any(not torch.equal(*blocks) for blocks in split_blocks(read(model, name), read(other, name))):
            return
    raise LabError(f"{model} and {other} hold the same weights: there is nothing to merge")
