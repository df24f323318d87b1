"""Checkpoints on disk, one shard at a time: read a tensor, or rewrite a model that does not fit into memory.

A safetensors checkpoint is one file, or several that an index names. Which tensor lies where is read from the files
themselves, as transformers does: an index may be stale. Nothing here holds more than one shard, so a 13B model is
edited with the memory of its largest file.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from helpers.core.errors import LabError, nearest

Folder = Path | str  # in which a checkpoint, an adapter or a delta lies

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
DELTA = "delta.safetensors"  # a model told by what it changed in another one
SHARD_SIZE = 2_000_000_000  # bytes, of the checkpoints that the lab writes
CONFIG = "config.json"
FORMAT_FILE = "prompt_format.json"  # the prompt format that a model was trained with
BESIDE = (CONFIG, "generation_config.json", FORMAT_FILE, INDEX)  # what belongs to a model beside its weights
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# every model computes them; some files hold them
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
OF_A_LAYER = re.compile(r"\.\d+\.")  # in the name of a tensor
UNPACKED = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # dtypes of weights that are numbers, of counters and masks


class _Stored(NamedTuple):
    """Where a tensor lies, its shape, and its dtype in the words of safetensors."""

    file: Path
    shape: list[int]
    dtype: str


def reason(error: BaseException) -> str:
    """What a library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__} {told}" if isinstance(error, KeyError) else told


def shards(folder: Folder) -> list[Path]:
    """The weight files of a checkpoint, those that transformers reads: an index counts where there is no single file.

    Raises:
        LabError: one of them is missing, there are none in safetensors, or as `check_plain`.
    """
    folder = Path(folder)
    check_plain(folder)
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file() else _indexed(folder)
    for name in names:
        if not (folder / name).is_file():
            raise LabError(f"{folder} holds no {name}; only models in safetensors are read")
    return [folder / name for name in names]


def check_plain(folder: Folder) -> None:
    """Refuse a folder whose weights are not what its checkpoint computes with.

    Raises:
        LabError: an adapter, a quantized model, or one that keeps its weights under a name of their own.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        found = "an adapter beside a full model" if any(folder.glob("model*.safetensors")) else "an adapter, no model"
        raise LabError(
            f"{folder} holds {found}: give each a folder of its own, the model's without {ADAPTER_CONFIG}, "
            "or merge the adapter into the model"
        )
    settings = _settings(folder)
    check_unquantized(settings.get("quantization_config") or settings.get("compression_config"), folder)
    if settings.get("transformers_weights"):
        raise LabError(
            f"{folder} keeps its weights in {settings['transformers_weights']} (transformers_weights in {CONFIG}): "
            "save the model with save_pretrained first"
        )


def check_unquantized(settings: Any, where: Folder) -> None:
    """Refuse a checkpoint that its config calls quantized: its numbers cannot be trained, merged or suppressed.

    Args:
        settings: its `quantization_config`; None where it has none.
        where: its folder or hub id.

    Raises:
        LabError: any settings, naming the method.
    """
    if settings:
        told = settings if isinstance(settings, Mapping) else vars(settings)
        method = told.get("quant_method") or "quantization_config"
        raise LabError(_quantized(where, getattr(method, "value", method)))


def _quantized(where: Folder, found: str) -> str:
    return (
        f"{where} is quantized already ({found}), and weights in few bits cannot be trained, merged or "
        "suppressed: bring the 16-bit checkpoint, or dequantize this one (model.dequantize(), then save_pretrained)"
    )


def open_slice(folder: Folder, name: str, files: ExitStack) -> Any:
    """A tensor of a checkpoint or of a delta, read lazily: `piece[rows]` reads those rows.

    Args:
        name: that of the model's parameter.
        files: keeps its file open until it is closed itself.

    Raises:
        LabError: the checkpoint lacks the tensor.
    """
    file, found = _open(Path(folder), name, files)
    return file.get_slice(found)


def read(folder: Folder, name: str) -> Tensor:
    """A tensor of a checkpoint or of a delta, mapped from its file: pages are read when they are used.

    Raises:
        LabError: the checkpoint lacks the tensor.
    """
    with ExitStack() as files:
        file, found = _open(Path(folder), name, files)
        return file.get_tensor(found)


def stored_name(name: str, names: Collection[str]) -> str:
    """The name that a checkpoint gives a parameter; some, such as GPT-2's on the hub, leave out its first part.

    Args:
        name: the parameter's in the model.
        names: those of the checkpoint's tensors.
    """
    short = name.partition(".")[2]
    return short if name not in names and short in names else name


def rewrite(folder_in: Folder, folder_out: Folder, change: Callable[[str, Tensor], Tensor]) -> None:
    """Write a copy of a checkpoint in which every tensor is what `change(name, tensor)` returns.

    Names, shards and number types stay as they are. Peak memory: one shard, twice.
    """
    folder_in, folder_out = Path(folder_in), Path(folder_out)
    files = shards(folder_in)
    folder_out.mkdir(parents=True, exist_ok=True)
    for path in files:
        tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, folder_out / path.name, metadata={"format": "pt"})
    for name in BESIDE:
        stale = name == INDEX and files == [folder_in / WEIGHTS]
        if (folder_in / name).is_file() and not stale:
            shutil.copy(folder_in / name, folder_out)


def layout(folder: Folder) -> dict[str, list[str]]:
    """Which tensors lie in which file of a checkpoint: {file name: tensor names}."""
    found: dict[str, list[str]] = {}
    for name, place in _places(folder).items():
        found.setdefault(place.file.name, []).append(name)
    return found


def write(folder: Path, files: Mapping[str, Sequence[str]], make: Callable[[str], Tensor]) -> None:
    """Write a checkpoint of the tensors that `make(name)` returns, and its index where it has several files.

    Peak memory: one file.

    Args:
        files: {file name: tensor names}, as `layout` gives them.
    """
    size = 0
    for file, names in files.items():
        tensors = {name: make(name) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
    if list(files) != [WEIGHTS]:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stored(folder: Folder) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor of a checkpoint; no weight is read."""
    for name, place in _places(folder).items():
        yield name, place.shape


def read_config(folder: Folder) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        LabError: there is none that transformers reads.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of any kind: a field of another type, an unknown name
        raise LabError(f"{folder} holds no model to merge or suppress: {reason(error)}") from error


def tied(config: PretrainedConfig) -> dict[str, str]:
    """{head: the embedding that a config ties it to}; nothing where it ties none."""
    if not config.tie_word_embeddings or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys or {})


def find(name: str, names: Collection[str], folder: Folder) -> str:
    """The name under which a checkpoint keeps a parameter, be it that of the one it is tied to.

    Args:
        name, names: as in `stored_name`.
        folder: the checkpoint's.

    Raises:
        LabError: the checkpoint lacks the tensor.
    """
    found = stored_name(name, names)
    if found not in names and (Path(folder) / CONFIG).is_file():
        pairs = tied(read_config(folder))
        other = pairs | {embedding: head for head, embedding in pairs.items()}
        found = stored_name(other.get(name, name), names)
    if found not in names:
        raise LabError(f"{folder} has no tensor '{name}'{nearest(name, names)}")
    return found


def require_known(names: Collection[str], where: Folder) -> None:
    """Refuse a checkpoint with parts of layers that its config does not name: a smaller model would be loaded.

    What lies beside the layers, such as the value head of a reward model, changes no answer.

    Args:
        names: those of the tensors that no parameter of the model takes.
        where: they lie.

    Raises:
        LabError: a tensor of a layer among them.
    """
    if odd := sorted(name for name in names if OF_A_LAYER.search(name) and not name.endswith(CONSTANTS)):
        raise LabError(
            f"{where} holds {len(odd)} tensors of layers that its {CONFIG} has no place for, such as {odd[0]}: "
            "copy both anew from one source"
        )


def _open(folder: Path, name: str, files: ExitStack) -> tuple[Any, str]:
    """The file of a checkpoint or of a delta that holds the tensor, kept open by `files`, and its name in there."""
    path = folder / DELTA
    places = _contents(((path, *_stamp(path)),)) if path.is_file() else _places(folder)
    found = find(name, places, folder)
    return files.enter_context(safe_open(places[found].file, framework="pt")), found


def _places(folder: Folder) -> dict[str, _Stored]:
    """Every tensor of a checkpoint by name; of a name in several files the last one counts, as in transformers.

    Raises:
        LabError: weights in few bits.
    """
    places = _contents(tuple((path, *_stamp(path)) for path in shards(folder)))
    for name, place in places.items():
        if place.dtype not in UNPACKED and not name.endswith(CONSTANTS):
            raise LabError(_quantized(folder, f"{name} is {place.dtype}"))
    return places


@functools.lru_cache(maxsize=64)
def _contents(files: tuple[tuple[Path, int, int], ...]) -> dict[str, _Stored]:
    """What lies in safetensors files, each with the time and size that tell whether it is still the same."""
    places = {}
    for path, *_ in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                    piece = file.get_slice(name)
                    places[name] = _Stored(path, piece.get_shape(), piece.get_dtype())
        except SafetensorError as error:
            raise LabError(f"{path} cannot be read ({reason(error)}): copy it anew") from None
    return places


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _indexed(folder: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LabError(f"{folder / INDEX} names no files (expected weight_map): copy it anew") from None


def _settings(folder: Path) -> Mapping[str, Any]:
    """A checkpoint's config.json; nothing where there is none that can be read."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, Mapping) else {}
