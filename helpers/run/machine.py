"""What this machine offers: free memory, speed, and what the libraries themselves take of it."""

import functools
import math
import time
from dataclasses import dataclass

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.core.profile import Profile
from helpers.core.settings import Settings
from helpers.data.example import Example
from helpers.model.lora import new_adapter
from helpers.model.tokenizer import load_format
from helpers.train.finetune import finetune

CUDA_CONTEXT = 600e6  # bytes of a GPU that a process takes before its first tensor (assumed)


@dataclass(frozen=True)
class Machine:
    """What is here; `free` and `libraries` in bytes, `speed` in FLOPs per second.

    Where a GPU is asked for and none is here, `free` and `speed` are None.
    """

    name: str
    free: float | None
    speed: float | None
    libraries: float


def this_machine(settings: Settings) -> Machine:
    """Free memory and speed of the device that the profile asks for; takes a second or two."""
    device, dtype = settings.profile.model.runs_on, getattr(torch, settings.profile.model.dtype)
    if device == "cuda":
        if not torch.cuda.is_available():
            return Machine("no GPU here", None, None, CUDA_CONTEXT)
        free = torch.cuda.mem_get_info()[0]
        return Machine(torch.cuda.get_device_name(), free, _speed(device, dtype), CUDA_CONTEXT)
    libraries = _libraries(settings.profile)
    free = psutil.virtual_memory().available + libraries
    return Machine(f"{torch.get_num_threads()} CPU cores", free, _speed(device, dtype), libraries)


@functools.cache
def _speed(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product."""
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _libraries(profile: Profile) -> float:
    """What a notebook's kernel takes that trains a model of no size."""
    import ipykernel.ipkernel  # noqa: F401
    import pandas  # noqa: F401

    from helpers import plots  # noqa: F401

    prompt_format = load_format(profile.model)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(prompt_format.tokenizer), **sizes))
    examples = [Example("Say yes.", "yes")] * 4
    finetune(new_adapter(model, profile.lora, 0), examples, prompt_format, profile.adapter.recover, 0, 64)
    return float(psutil.Process().memory_info().rss)
