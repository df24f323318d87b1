"""Loading and saving: checkpoints, 4-bit bases, adapters.

Only safetensors are read and remote code is never run: a suspicious model is untrusted input. A 4-bit base is loaded
through bitsandbytes (NF4 with double quantization, as in QLoRA), on the CPU as well; adapters are PEFT's own.
"""

import contextlib
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from helpers.core.device import require_device
from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile import ModelSpec
from helpers.model.adapters import is_adapter
from helpers.model.checkpoint import from_pretrained, load_config, locate
from helpers.model.four_bit import keep_packed, quantization
from helpers.model.lora import order_layers, with_adapter
from helpers.model.shards import CONFIG, INDEX, SHARD_SIZE, WEIGHTS, Folder, reason, require_known, stored
from helpers.model.tokenizer import recorded_format

logging.disable_progress_bar()  # shards of a small model load before a bar can be read


def load_base(spec: ModelSpec, four_bit: bool = False, path: Folder | None = None) -> PreTrainedModel:
    """Load the weights of a model in its dtype, or in 4 bits.

    The model remembers the prompt format recorded beside it, if there is one; see `trained_format`.

    Args:
        spec: model path or hub id, revision, dtype and device.
        four_bit: packed by bitsandbytes, see `quantization`; frozen, computes in the spec's dtype.
        path: another folder with the same architecture, such as a suspicious model of full access; one that is stored
            in 32 bits, because 16 would lose what was trained, is read in 32 bits whatever the spec says.

    Raises:
        LabError: pickle-only, unknown, incomplete or quantized checkpoint, one with an adapter beside it, or a profile
            that wants a GPU where there is none.
    """
    require_device(spec)
    _check_unpacked(spec, path)
    dtype = getattr(torch, spec.dtype)
    packing = {"quantization_config": quantization(load_config(spec, path), spec)} if four_bit else {}
    model, report = from_pretrained(
        AutoModelForCausalLM,
        spec,
        path,
        dtype=dtype if four_bit else _at_least(dtype, path),
        use_safetensors=True,
        device_map={"": spec.runs_on},
        output_loading_info=True,
        **packing,
    )
    _check_complete(report, path or spec.path)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LabError(f"{spec.path} holds an adapter beside a full model: download it and merge or remove the adapter")
    _make_savable(model.generation_config, path or spec.path)
    keep_packed(model)
    if spec.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # has no effect outside of training
    model.trained_format = recorded_format(locate(path or spec.path))
    return model.eval()


def _at_least(dtype, path):
    """The dtype to read a folder in: `dtype`, or float32 where its config says that it was stored so."""
    config = ROOT / str(path) / CONFIG
    settings = read_json(config) if path and config.is_file() else {}
    recorded = settings.get("dtype") or settings.get("torch_dtype")  # its older name
    return torch.float32 if recorded == "float32" else dtype


def _check_unpacked(spec, path):
    """Refuse weights in few bits before they are loaded: transformers would compute with them, or cast them."""
    load_config(spec, path)
    folder = locate(path or spec.path)
    if Path(folder).is_dir() and any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
        list(stored(folder))


def _make_savable(settings, path):
    """Let transformers save what it loads: sampling numbers without sampling stop it, after the training."""
    if settings is None:
        return
    with contextlib.suppress(ValueError):
        settings.validate(strict=True)
        return
    settings.do_sample = True  # the lab's own completions never look at it
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise LabError(f"the generation_config.json of {path} cannot be saved again: {reason(error)}") from None


def _check_complete(report, path):
    """Refuse a checkpoint whose missing tensors transformers would draw, or whose surplus layers it would drop."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise LabError(f"{path} lacks {len(missing)} of the model's tensors, such as {missing[0]}: copy it anew")
    require_known(report["unexpected_keys"], path)


def load_suspect(spec: ModelSpec, folder: Folder) -> PreTrainedModel:
    """Load a model as a user runs it: an adapter folder is merged into its base, a full model is loaded as it is.

    It remembers the prompt format recorded beside it; see `trained_format`.

    Args:
        spec: the base of an adapter; of a full model, its architecture, dtype and device.
        folder: of the adapter or of the full model.

    Raises:
        LabError: as `load_base` and `with_adapter`.
    """
    if is_adapter(folder):
        model = with_adapter(load_base(spec), folder).merge_and_unload().eval()
    else:
        model = load_base(spec, path=str(folder))
    model.trained_format = recorded_format(folder)
    return model


def save(model: PreTrainedModel | PeftModel, folder: Folder) -> None:
    """Write a model (safetensors) or, for a PEFT model, its adapter alone."""
    model.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    for readme in Path(folder).glob("README.md"):
        readme.unlink()  # PEFT leaves an empty model card
    order_layers(folder)
