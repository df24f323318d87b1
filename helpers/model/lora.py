"""LoRA adapters, PEFT's own: new, loaded, stored."""

import contextlib
import copy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from helpers.core.disk import read_json, write_json
from helpers.core.errors import LabError
from helpers.core.profile import Lora
from helpers.model.adapters import ADAPTER_FILE, read_adapter
from helpers.model.shards import ADAPTER_CONFIG, Folder, reason


def new_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Wrap `model` with a fresh LoRA adapter on all its linear layers but the head, as the field's attacks do.

    Args:
        lora: rank, alpha and dropout.
        seed: of lora_A; lora_B is zero, so that the model computes what it did before.
    """
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


def with_adapter(model: PreTrainedModel, folder: Folder, trainable: bool = False) -> PeftModel:
    """Wrap `model` with the adapter stored in `folder`; `trainable` goes on training it.

    Raises:
        LabError: an adapter that is more than scale * B @ A (see `adapters.read_adapter`), or whose tensors are not
            those this model needs: PEFT would start the missing ones anew.
    """
    read_adapter(folder, linear_sizes(model))
    with _fitting(folder):
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    _check_fit(adapted, folder, "default")
    return adapted


def add_adapter(adapted: PeftModel, folder: Folder, name: str) -> None:
    """Load another adapter of the same base beside the ones that a PEFT model has, under a name of its own.

    Raises:
        LabError: as `with_adapter`.
    """
    read_adapter(folder, linear_sizes(adapted.get_base_model()))
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


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
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


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """Return a copy of a PEFT model's adapter, on the CPU, under the names of an adapter file.

    Returns:
        {name: matrix}, for each adapted module lora_A [r, in] and lora_B [out, r].
    """
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def save_adapter(config: LoraConfig, tensors: dict[str, Tensor], folder: Folder) -> None:
    """Write an adapter from its PEFT configuration and its tensors, as `PeftModel.save_pretrained` would.

    Args:
        tensors: as `adapter_tensors` returns them.
        folder: made where it is missing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    stored = copy.copy(config)
    stored.inference_mode = True
    stored.save_pretrained(str(folder))
    order_layers(folder)


def order_layers(folder: Folder) -> None:
    """Sort the layers in an adapter's configuration: PEFT writes a set of them, another order in each process."""
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path) if path.is_file() else {}
    if isinstance(config.get("target_modules"), list):  # not a pattern
        write_json(path, config | {"target_modules": sorted(config["target_modules"])})
