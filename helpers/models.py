"""Loading and saving: checkpoints, 4-bit bases, adapters.

Only safetensors are read and remote code is never run: a suspicious model is untrusted input. A 4-bit base is loaded
through bitsandbytes (NF4 with double quantization, as in QLoRA), on the CPU as well; adapters are PEFT's own.
"""

import contextlib
import copy
from pathlib import Path

import bitsandbytes as bnb
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from helpers.adapters import ADAPTER_FILE, is_adapter, read_adapter
from helpers.chat import prompt_format
from helpers.profiles import HUB_ID, ROOT, LabError, require_device
from helpers.runs import read_json, write_json
from helpers.shards import (
    ADAPTER_CONFIG,
    CONFIG,
    FORMAT_FILE,
    INDEX,
    SHARD_SIZE,
    TOKENIZER,
    WEIGHTS,
    check_plain,
    check_unquantized,
    find,
    reason,
    require_known,
    stored,
)

logging.disable_progress_bar()  # shards of a small model load before a bar can be read


def locate(path):
    """Return the folder of a local model (relative paths start at the repository's root) or the hub id unchanged.

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


def local_folder(spec):
    """Return the folder in which a model's files lie, for a hub id the one it was downloaded to."""
    source = locate(spec.path)
    return source if Path(source).is_dir() else snapshot_download(source, revision=spec.revision, local_files_only=True)


def is_local(spec):
    """Whether a `profiles.ModelSpec` names a folder on this machine."""
    return (ROOT / Path(spec.path).expanduser()).is_dir()


def has_tokenizer(spec):
    """Whether a tokenizer can be read without a download; a folder is expected to hold one."""
    if is_local(spec):
        return True
    try:
        folder = Path(local_folder(spec))
    except (OSError, ValueError):  # a hub id that was not downloaded, a folder that is not there
        return False
    return any((folder / name).is_file() for name in TOKENIZER)


def load_tokenizer(spec):
    """Load the tokenizer of a `profiles.ModelSpec`.

    Where nothing beside it names its special tokens, the model's config does, at least the end; a missing padding token
    is replaced by the end.

    Raises:
        LabError: as `locate`, no tokenizer, or one with ids that the model's embedding has no row for.
    """
    config, folder = load_config(spec), Path(locate(spec.path))
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER):
        raise LabError(f"{folder} holds no tokenizer: copy the files that came with the model, such as {TOKENIZER[0]}")
    bare = (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file()
    # transformers would add its architecture's own special tokens to a tokenizer that says nothing of itself
    tokenizer = _from_pretrained(PreTrainedTokenizerFast if bare else AutoTokenizer, spec)
    for name in ("eos_token", "bos_token", "pad_token") if bare else ("eos_token",):
        _name_token(tokenizer, name, getattr(config, f"{name}_id", None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_vocabulary(tokenizer, config, spec.path)
    return tokenizer


def _name_token(tokenizer, name, ids):
    """Give a tokenizer the special token that a config names by its id, where it has none of that name itself."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    known = isinstance(first, int) and tokenizer.convert_ids_to_tokens(first)
    if getattr(tokenizer, name) is None and known:
        tokenizer.add_special_tokens({name: known})


def _check_vocabulary(tokenizer, config, path):
    """Refuse a tokenizer that can write ids beyond the embedding: training would stop at the first of them."""
    rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise LabError(
            f"the tokenizer of {path} has ids up to {largest} ({token!r}) and the model's embedding {rows} rows: "
            "resize it (model.resize_token_embeddings) and save both, or take the tokenizer that the model came with"
        )


def load_config(spec):
    """Load the configuration alone: shapes and names, no weights.

    Raises:
        LabError: as `locate`, or a configuration that transformers refuses.
    """
    return _read_config(spec)


def check_checkpoint(spec, shapes):
    """Refuse a checkpoint on this machine that lacks tensors of its model, or has other ones; reads no weight.

    Args:
        shapes: {name: shape} of the model's parameters, from `anatomy.parameter_shapes`.
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


def _read_config(spec, path=None):
    config = _from_pretrained(AutoConfig, spec, path)
    check_unquantized(getattr(config, "quantization_config", None), path or spec.path)
    return config


def load_format(spec):
    """Return the prompt format of a model: the same one for training, evaluation and every figure."""
    return prompt_format(load_tokenizer(spec), spec.prompt_format)


def load_base(spec, four_bit=False, path=None):
    """Load the weights of a `profiles.ModelSpec` in its dtype, or in 4 bits.

    The model remembers the prompt format recorded beside it, if there is one; see `trained_format`.

    Args:
        spec: model path or hub id, revision, dtype and device.
        four_bit: NF4 with double quantization through bitsandbytes; frozen, computes in the spec's dtype.
        path: another folder with the same architecture, such as a suspicious model of full access; one that is stored
            in 32 bits, because 16 would lose what was trained, is read in 32 bits whatever the spec says.

    Raises:
        LabError: pickle-only, unknown, incomplete or quantized checkpoint, one with an adapter beside it, or a profile
            that wants a GPU where there is none.
    """
    require_device(spec)
    _check_unpacked(spec, path)
    dtype = getattr(torch, spec.dtype)
    quantization = {}
    if four_bit:
        quantization = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        }
    model, report = _from_pretrained(
        AutoModelForCausalLM,
        spec,
        path,
        dtype=dtype if four_bit else _at_least(dtype, path),
        use_safetensors=True,
        device_map={"": spec.runs_on},
        output_loading_info=True,
        **quantization,
    )
    _check_complete(report, path or spec.path)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LabError(f"{spec.path} holds an adapter beside a full model: download it and merge or remove the adapter")
    _make_savable(model.generation_config, path or spec.path)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _check_width(name, module, spec.runs_on)
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation, and every later
            # backward pass through them is silently wrong.
            module.support_avx512bf16_for_cpu = False
    if spec.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # has no effect outside of training
    model.trained_format = recorded_format(locate(path or spec.path))
    return model.eval()


def _at_least(dtype, path):
    """The dtype to read a folder in: `dtype`, or float32 where its config says that it was stored so."""
    config = ROOT / str(path) / CONFIG
    stored = read_json(config).get("dtype") if path and config.is_file() else None
    return torch.float32 if stored == "float32" else dtype


def _check_unpacked(spec, path):
    """Refuse weights in few bits before they are loaded: transformers would compute with them, or cast them."""
    _read_config(spec, path)
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
    settings.do_sample = True  # the lab decodes by itself
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


def _check_width(name, module, device):
    """Refuse input widths (32, 48, 96 …) that bitsandbytes 0.50 dequantizes wrongly on some CPUs, without a word."""
    if device == "cpu" and module.in_features % 64:
        raise LabError(
            f"4-bit weights on the CPU need input widths in multiples of 64, and {name} has {module.in_features}: "
            "use a GPU, or another model"
        )


def _from_pretrained(auto, spec, path=None, **options):
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


def new_adapter(model, lora, seed):
    """Wrap `model` with a fresh LoRA adapter on all its linear layers but the head, as the field's attacks do."""
    set_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=_is_transposed(model),
    )
    return get_peft_model(model, config)


def _is_transposed(model):
    """Whether the layers store their weights as [in, out], as GPT-2 does; in 4 bits, whether they did."""
    return any(getattr(module, "source_cls", type(module)) is Conv1D for module in model.modules())


def with_adapter(model, folder, trainable=False):
    """Wrap `model` with the adapter stored in `folder`; `trainable` goes on training it.

    Raises:
        LabError: an adapter that is more than scale * B @ A (see `adapters.read_adapter`), or whose tensors are not
            those this model needs: PEFT would start the missing ones anew.
    """
    read_adapter(folder, _sizes(model))
    with _fitting(folder):
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    _check_fit(adapted, folder, "default")
    return adapted


def add_adapter(adapted, folder, name):
    """Load another adapter of the same base beside the ones that a PEFT model has, under a name of its own.

    Raises:
        LabError: as `with_adapter`.
    """
    read_adapter(folder, _sizes(adapted.get_base_model()))
    with _fitting(folder):
        adapted.load_adapter(str(folder), name)
    _check_fit(adapted, folder, name)


@contextlib.contextmanager
def _fitting(folder):
    """Tell in one line what PEFT says of settings that choose no matrix of the base, or that it does not know."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise LabError(f"the adapter in {folder} does not fit its base: {reason(error)}") from error


def _sizes(model):
    """(outputs, inputs) of every linear layer, by its name."""
    return {
        name: (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, (Conv1D, nn.Linear, LoraLayer))
    }


def _check_fit(adapted, folder, name):
    """Refuse an adapter whose settings choose other matrices than its file holds."""
    with safe_open(Path(folder) / ADAPTER_FILE, "pt") as stored_adapter:
        odd = sorted(set(stored_adapter.keys()) ^ get_peft_model_state_dict(adapted, adapter_name=name).keys())
    if odd:
        raise LabError(f"the adapter in {folder} does not fit its base: {len(odd)} tensors differ, such as {odd[0]}")


def load_suspect(spec, folder):
    """Load a model as a user runs it: an adapter folder is merged into its base, a full model is loaded as it is.

    It remembers the prompt format recorded beside it; see `trained_format`.
    """
    if is_adapter(folder):
        model = with_adapter(load_base(spec), folder).merge_and_unload().eval()
    else:
        model = load_base(spec, path=str(folder))
    model.trained_format = recorded_format(folder)
    return model


def record_format(folder, prompt_format):
    """Write beside a model which prompt format it was trained with, so that nobody has to guess it."""
    write_json(Path(folder) / FORMAT_FILE, prompt_format.record)


def recorded_format(folder):
    """Return the `PromptFormat.record` that lies beside a model; None where its folder does not say."""
    path = Path(folder) / FORMAT_FILE
    return read_json(path) if path.is_file() else None


def trained_format(model):
    """Return the record of the format that a loaded model was trained with; None where none is known."""
    return getattr(model, "trained_format", None)


def save(model, folder):
    """Write a model (safetensors) or, for a PEFT model, its adapter alone."""
    model.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    for readme in Path(folder).glob("README.md"):
        readme.unlink()  # PEFT leaves an empty model card
    _order_layers(folder)


def adapter_tensors(model, adapter="default"):
    """Return a copy of a PEFT model's adapter, on the CPU, under the names of an adapter file."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def save_adapter(config, tensors, folder):
    """Write an adapter from its PEFT configuration and its tensors, as `PeftModel.save_pretrained` would."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    stored = copy.copy(config)
    stored.inference_mode = True
    stored.save_pretrained(str(folder))
    _order_layers(folder)


def _order_layers(folder):
    """Sort the layers in an adapter's configuration: PEFT writes a set of them, another order in each process."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path) if path.is_file() else {}
    if isinstance(config.get("target_modules"), list):  # not a pattern
        write_json(path, config | {"target_modules": sorted(config["target_modules"])})
