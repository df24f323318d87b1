"""Checkpoints: where they lie, and whether they can be read. Only safetensors are, and remote code is never run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PretrainedConfig

from helpers.core.errors import LabError
from helpers.core.paths import HUB_ID, ROOT
from helpers.core.profile import ModelSpec
from helpers.model.shards import Folder, check_plain, check_unquantized, find, reason, require_known, stored


def locate(path: Folder) -> str:
    """Return the folder of a local model (relative paths start at the repository's root) or the hub id unchanged.

    Args:
        path: a folder, or a hub id such as "owner/name".

    Raises:
        LabError: no such folder, one that has no safetensors (pickle checkpoints are refused), an adapter in it, or
            weights that are quantized already.
    """
    folder = ROOT / Path(path).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(str(path)):
        return str(path)
    if not folder.is_dir():
        raise LabError(
            f"model folder '{path}' does not exist; `make base` makes the lab's own small models, `make model` "
            "fetches a real one"
        )
    if not list(folder.glob("*.safetensors")):
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        found = f"only the pickle {pickles[0]}, which can run code when loaded" if pickles else "no weights"
        raise LabError(f"{folder} holds {found}; the lab reads safetensors: save the model with save_pretrained first")
    check_plain(folder)
    return str(folder)


def local_folder(spec: ModelSpec) -> str:
    """Return the folder in which a model's files lie, for a hub id the one it was downloaded to.

    Raises:
        LabError: as `locate`.
        OSError: a hub id of which nothing was downloaded.
    """
    source = locate(spec.path)
    return source if Path(source).is_dir() else snapshot_download(source, revision=spec.revision, local_files_only=True)


def is_local(spec: ModelSpec) -> bool:
    """Whether a model is a folder on this machine."""
    return (ROOT / Path(spec.path).expanduser()).is_dir()


def check_checkpoint(spec: ModelSpec, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a checkpoint on this machine that lacks tensors of its model, or has other ones; reads no weight.

    Args:
        shapes: {name: shape} of the model's parameters, from `architecture.parameter_shapes`.

    Raises:
        LabError: a tensor that is missing, has another shape, or belongs to a layer that the model does not have.
    """
    if not is_local(spec):
        return
    folder = locate(spec.path)
    found = dict(stored(folder))
    taken = {name: find(name, found, folder) for name in shapes}
    for name, shape in shapes.items():
        if (size := found[taken[name]]) != list(shape):
            raise LabError(f"{name} has shape {size} in {folder}, and {list(shape)} by its config: copy it anew")
    require_known(found.keys() - taken.values(), folder)


def load_config(spec: ModelSpec, path: Folder | None = None) -> PretrainedConfig:
    """Load the configuration of a model, or that of the folder `path`, alone: shapes and names, no weights.

    Raises:
        LabError: as `locate`, a configuration that transformers refuses, or weights that are quantized already.
    """
    config = from_pretrained(AutoConfig, spec, path)
    check_unquantized(getattr(config, "quantization_config", None), path or spec.path)
    return config


def from_pretrained(auto: type, spec: ModelSpec, path: Folder | None = None, **options: Any) -> Any:
    """Have one of transformers' Auto classes read a checkpoint, or the folder `path`; tell in one line why it cannot.

    Remote code is never run.

    Args:
        auto: such as `AutoConfig`; has a `from_pretrained`.
        options: what its `from_pretrained` takes beside path, revision and `trust_remote_code`.

    Returns:
        what its `from_pretrained` returns.

    Raises:
        LabError: as `locate`, or whatever it cannot read.
    """
    source = locate(path or spec.path)
    try:
        return auto.from_pretrained(
            source, revision=spec.revision if source == spec.path else None, trust_remote_code=False, **options
        )
    except Exception as error:  # of any kind: a field of another type, an unknown name, a damaged file
        helps = "give a folder with safetensors, or a hub id you can reach"
        if not isinstance(error, OSError):
            helps = "no model can be made of its files: compare config.json with the original's"
        raise LabError(f"cannot load {source!r}: {reason(error)} ({helps})") from error
