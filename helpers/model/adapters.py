"""What an adapter has to be: scale * B @ A on matrices of the plain base, and nothing else.

PEFT stores under one file name also what changes the base itself, trains whole layers or rescales their outputs. Every
reader of an adapter (loading, scoring, suppression, merging, training on) asks `read_adapter`, which refuses what any
of them would compute wrongly: zeroing channels of B and A has to give the base back.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from helpers.core.errors import LabError
from helpers.model.shards import ADAPTER_CONFIG, INDEX, WEIGHTS, Folder, reason

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
Sizes = Mapping[str, tuple[int, int]]  # {matrix: (outputs, inputs)}

# what leaves scale * B @ A as it is: names, what was trained and how, and the numbers that the scale is made of
PLAIN = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
PLAIN |= {"inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
PLAIN |= {"lora_dropout", "fan_in_fan_out", "eva_config", "megatron_core", "runtime_config", "ensure_weight_tying"}
PLAIN |= {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "qalora_group_size"}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others subtract the start from the base
TASKS = (None, "", "CAUSAL_LM")  # others bring a head of their own
HEADS = ("lm_head", "embed_out")


class Adapter(NamedTuple):
    """An adapter that is nothing but low-rank updates: its PEFT settings and the tensors of its file."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """The adapted matrices by the names they have in the base."""
        ends = ".lora_A.weight"
        return [name.removeprefix(PREFIX).removesuffix(ends) for name in self.tensors if name.endswith(ends)]

    def scale(self, module: str) -> float:
        """What B @ A of a matrix is multiplied by: alpha over the rank, for rsLoRA over its root."""
        alpha = self._number("alpha_pattern", "lora_alpha", module)
        return alpha / self.rank(module) ** (0.5 if self.settings.get("use_rslora") else 1)

    def rank(self, module: str) -> int:
        """The rank that the settings give a matrix."""
        return self._number("rank_pattern", "r", module)

    def _number(self, pattern: str, key: str, module: str) -> Any:
        numbers = self.settings.get(pattern) or {}
        return numbers.get(get_pattern_key(numbers, module), self.settings.get(key, _DEFAULTS[key]))


_DEFAULTS = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}


def is_adapter(folder: Folder) -> bool:
    """Whether a folder says of itself that it holds an adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Folder, sizes: Sizes | None = None) -> Adapter:
    """Read the adapter in `folder`, in safetensors.

    Args:
        sizes: (outputs, inputs) of the base's matrices, where the base is known.

    Raises:
        LabError: an adapter that is more than scale * B @ A over its base, or does not fit the base.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise LabError(
            f"{folder} holds no {ADAPTER_FILE}; only PEFT adapters in safetensors are read: save it anew with "
            "save_pretrained"
        )
    if found := [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]:
        raise LabError(f"{folder} holds an adapter beside a full model ({found[0]}): give each a folder of its own")
    settings = _settings(folder)
    _check_settings(settings, folder)
    try:
        adapter = Adapter(settings, load_file(folder / ADAPTER_FILE))
    except SafetensorError as error:
        raise LabError(f"{folder / ADAPTER_FILE} cannot be read ({reason(error)}): copy it anew") from None
    _check_tensors(adapter, folder)
    if sizes is not None:
        _check_sizes(adapter, folder, sizes)
    return adapter


def require_matrices(folder: Folder, modules: Iterable[str]) -> None:
    """Refuse an adapter that leaves out one of these matrices of the base, before hours are spent on it.

    Args:
        modules: matrices by the names they have in the base.

    Raises:
        LabError: one of them that it leaves out, or as `read_adapter`.
    """
    adapted = read_adapter(folder).modules
    if missing := [module for module in modules if module not in adapted]:
        kinds = ", ".join(sorted({module.rpartition(".")[2] for module in adapted}))
        raise LabError(
            f"the adapter in {folder} has no LoRA on {missing[0]}, so nothing scores its channels (it adapts {kinds}): "
            "merge it into its base and use ACCESS=full"
        )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"{folder} holds no {ADAPTER_CONFIG} that can be read ({reason(error)}): copy it anew") from None
    if not isinstance(settings, dict):
        raise LabError(f"{folder / ADAPTER_CONFIG} should hold PEFT's settings, and holds a {type(settings).__name__}")
    return settings


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse every setting that is not known to be harmless: PEFT gets new ones with each release."""
    if settings.get("peft_type") != "LORA":
        raise LabError(_refusal(folder, f"peft_type {settings.get('peft_type')}"))
    if settings.get("task_type") not in TASKS:
        raise LabError(_refusal(folder, f"task_type {settings['task_type']}"))
    if (start := settings.get("init_lora_weights")) not in PLAIN_STARTS:
        raise LabError(_refusal(folder, f"init_lora_weights {start!r}, which changes the base"))
    known = PLAIN | {"init_lora_weights"}
    odd = [key for key, value in settings.items() if key not in known and value and value != _DEFAULTS.get(key)]
    if odd:
        raise LabError(_refusal(folder, ", ".join(odd)))


def _check_tensors(adapter: Adapter, folder: Path) -> None:
    """Refuse tensors beside whole pairs of A and B, and pairs that are not what the settings say."""
    pairs = {f"{PREFIX}{module}.lora_{part}.weight": module for module in adapter.modules for part in "AB"}
    if missing := sorted(pairs.keys() - adapter.tensors.keys()):
        raise LabError(
            f"the adapter in {folder} does not fit its base: {len(missing)} tensors differ, such as {missing[0]}, "
            "which is missing: copy it anew"
        )
    if more := sorted(adapter.tensors.keys() - pairs.keys()):
        raise LabError(_refusal(folder, f"the tensor {more[0]}"))
    if not pairs:
        raise LabError(_refusal(folder, "no LoRA matrices"))
    for name, module in pairs.items():
        tensor, rank = adapter.tensors[name], adapter.rank(module)
        if module.rpartition(".")[2] in HEADS:
            raise LabError(_refusal(folder, f"LoRA on the head {module}, where no channel can be suppressed"))
        if not tensor.is_floating_point() or tensor.ndim != 2:
            raise LabError(_refusal(folder, f"{name} of {tensor.dtype} and shape {list(tensor.shape)}"))
        if tensor.shape[1 if ".lora_B." in name else 0] != rank:
            raise LabError(f"{name} in {folder} has shape {list(tensor.shape)}, its settings rank {rank}: copy it anew")
        if not tensor.isfinite().all():
            raise LabError(f"{folder} holds NaN or infinite numbers in {name}: the adapter is damaged, copy it anew")


def _check_sizes(adapter: Adapter, folder: Path, sizes: Sizes) -> None:
    for module in adapter.modules:
        down, up = (adapter.tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        found, expected = (up.shape[0], down.shape[1]), sizes.get(module)
        if found != expected:
            has = "none of that name" if expected is None else f"{list(expected)}"
            raise LabError(
                f"the adapter in {folder} does not fit its base: {module} is {list(found)} there and the base has "
                f"{has}; load the base that it was trained on"
            )


def _refusal(folder: Path, found: str) -> str:
    return (
        f"{folder} is not a plain LoRA adapter (found {found}): merge it into its base with PEFT's merge_and_unload "
        "and bring the full model"
    )
