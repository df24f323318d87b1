"""Vaccines: N paired variants of the suspicious model (BD-VAX §4.2, Algorithm 1).

Variant i is trained twice from the same start: θᵢᵇᵈ on clean rows plus the same rows with a synthetic key and behavior,
θᵢᶜˡᵉᵃⁿ on the clean rows only. What both share cancels in their difference; what is left is the work of the poison.
The base is frozen and held in 4 bits, so that the 2N runs fit where one model fits, and all of them train in one pass.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from helpers.data.own_backdoors import vaccine_behaviors, vaccine_keys
from helpers.data.planting import poison
from helpers.model.adapters import is_adapter, require_matrices
from helpers.model.architecture import attention_slots, channel_axes, mlp_slots
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base, save
from helpers.model.lora import adapter_tensors, new_adapter, save_adapter, with_adapter
from helpers.model.shards import DELTA, open_slice
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune
from helpers.train.multi_lora import Job, train_together


@dataclass(frozen=True)
class Variant:
    """One variant to train: its rows, the seed of their order and of fresh probes, and the folder it goes to."""

    rows: list
    seed: int
    folder: Path


def vaccine_pairs(defender, signature, kind, seed):
    """Return for each variant i its key k_i, payload b_i, clean set and poisoned set (BD-VAX §4.2, Algorithm 1).

    Args:
        defender: `data.roles.DefenderData`, whose vaccine sets are used.
        signature: `core.profile.Signature`; N and the family of payloads.
        kind: what is assumed of the attack where the family is "task": the family of its kind; not read otherwise.
        seed: decides where the keys stand.
    """
    keys, planted = vaccine_keys(), vaccine_behaviors(signature.family, kind)
    return paired(keys[: signature.n], planted, defender.vaccine_sets, f"{seed}/vaccine")


def paired(keys, planted, sets, seed):
    """Key, payload, clean and poisoned set of each variant; payloads come in turn."""
    chosen = [planted[i % len(planted)] for i in range(len(keys))]
    return [
        (key, one.payload, clean, poison(clean, key, one, f"{seed}{i}"))
        for i, (key, one, clean) in enumerate(zip(keys, chosen, sets, strict=True))
    ]


def start_variant(profile, access, suspicious, seed):
    """Return the trainable model from which a variant starts, a fresh copy at each call.

    Adapter access: the suspicious adapter, trained on, over its 4-bit base. Full access: fresh LoRA probes over the
    suspicious weights in 4 bits (`vaccine_weights: lora`) or all its weights (`full`).

    Args:
        profile: `core.profile.Profile`.
        access: "adapter" or "full".
        suspicious: folder of the suspicious adapter or model.
        seed: initialises fresh probes.
    """
    if access == "adapter":
        require_matrices(suspicious, _scored(profile))
        return with_adapter(load_base(profile.model, four_bit=True), suspicious, trainable=True)
    if profile.access(access).vaccine_weights == "lora":
        return new_adapter(load_base(profile.model, four_bit=True, path=str(suspicious)), profile.lora, seed)
    return load_base(profile.model, path=str(suspicious))


def _scored(profile):
    """The matrices whose channels a signature scores: the MLP's, and the attention's where heads are cut as well."""
    config = load_config(profile.model)
    layers = mlp_slots(config) + (attention_slots(config) if profile.adapter.suppress.heads else [])
    return [slot.module for layer in layers for slot in layer]


def load_variant(profile, access, suspicious, folder):
    """Load a trained variant for evaluation, its adapter or delta added to what it was trained on."""
    base = load_base(profile.model, path=None if access == "adapter" else str(suspicious))
    if not is_adapter(folder):
        return _with_delta(base, folder)
    return with_adapter(base, folder).merge_and_unload().eval()


def train_variant(profile, access, suspicious, rows, prompt_format, seed, folder):
    """Train one variant on `rows` from the suspicious model and write it to `folder`: its adapter, or its delta.

    Where all weights train, only what is scored is kept: the change of each MLP and attention matrix, in bfloat16.
    A change is small beside its weight, so 16 bits tell it far better than they would tell the changed weight.

    Both members of a pair are called with the same seed: equal initial probes, so that Δᵢ holds nothing but training.

    Returns:
        the training record of `finetune`.
    """
    model = start_variant(profile, access, suspicious, seed)
    record = finetune(model, rows, prompt_format, profile.access(access).vaccine, seed, profile.lengths.train_tokens)
    if access == "full" and profile.full.vaccine_weights == "full":
        _save_delta(model, suspicious, folder)
    else:
        save(model, folder)
    record_format(folder, prompt_format)
    return record


def train_variants(profile, access, suspicious, variants, prompt_format):
    """Train several variants and write each to its folder, all in one pass where only LoRA numbers train.

    Each ends where `train_variant` would have taken it, up to rounding. Peak memory: the base once, K adapters with
    their optimizer states, and the activations of `lengths.at_once` tokens.

    Args:
        variants: list of `Variant`; twins share their seed.

    Returns:
        the training record of each.
    """
    if access == "full" and profile.full.vaccine_weights == "full":
        return [
            train_variant(profile, access, suspicious, v.rows, prompt_format, v.seed, v.folder)
            for v in tqdm(variants, desc="variants")
        ]
    model, starts = _starts(profile, access, suspicious, [v.seed for v in variants])
    config, lengths = model.peft_config["default"], profile.lengths
    jobs = [
        Job(v.rows, v.seed, start, f"variant {Path(v.folder).name}") for v, start in zip(variants, starts, strict=True)
    ]
    budget = profile.access(access).vaccine
    trained = train_together(model, jobs, prompt_format, budget, lengths.train_tokens, lengths.at_once, "variants")
    for variant, (tensors, _) in zip(variants, trained, strict=True):
        save_adapter(config, tensors, variant.folder)
        record_format(variant.folder, prompt_format)
    return [record for _, record in trained]


def _save_delta(model, origin, folder):
    """Write what training changed in the matrices that have channels, read beside the origin one matrix at a time."""
    deltas = {}
    for name in (f"{module}.weight" for module in channel_axes(model.config)):
        with ExitStack() as files:
            before = open_slice(origin, name, files)[:]
        deltas[name] = (model.get_parameter(name).detach().cpu().float() - before.float()).bfloat16()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(deltas, Path(folder) / DELTA, metadata={"format": "pt"})


@torch.no_grad()
def _with_delta(model, folder):
    for name, delta in load_file(Path(folder) / DELTA).items():
        weight = model.get_parameter(name)
        weight.add_(delta.to(weight))
    return model


def _starts(profile, access, suspicious, seeds):
    """One PEFT model and, for each seed, the tensors its adapter starts from: those of `start_variant`."""
    if access == "adapter":
        model = start_variant(profile, access, suspicious, seeds[0])
        return model, [adapter_tensors(model)] * len(seeds)
    base, starts = load_base(profile.model, four_bit=True, path=str(suspicious)), {}
    for seed in dict.fromkeys(seeds):
        model = new_adapter(base, profile.lora, seed)
        starts[seed] = adapter_tensors(model)
        base = model.unload()
    return new_adapter(base, profile.lora, seeds[0]), [starts[seed] for seed in seeds]
