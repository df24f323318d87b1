"""Vaccines: N paired variants of the suspicious model (BD-VAX §4.2, Algorithm 1).

Variant i is trained twice from the same start: θᵢᵇᵈ on clean rows plus the same rows with a synthetic key and behavior,
θᵢᶜˡᵉᵃⁿ on the clean rows only. What both share cancels in their difference; what is left is the work of the poison.
The base is frozen and held in 4 bits, so that the 2N runs fit where one model fits.
"""

from pathlib import Path

from helpers.models import load_base, new_adapter, save, with_adapter
from helpers.training.finetune import finetune


def start_variant(profile, access, suspicious, seed):
    """Return the trainable model from which a variant starts, a fresh copy at each call.

    Adapter access: the suspicious adapter, trained on, over its 4-bit base. Full access: fresh LoRA probes over the
    suspicious weights in 4 bits (`vaccine_weights: lora`) or all its weights (`full`).

    Args:
        profile: `profiles.Profile`.
        access: "adapter" or "full".
        suspicious: folder of the suspicious adapter or model.
        seed: initialises fresh probes.
    """
    if access == "adapter":
        return with_adapter(load_base(profile.model, four_bit=True), suspicious, trainable=True)
    if profile.access(access).vaccine_weights == "lora":
        return new_adapter(load_base(profile.model, four_bit=True, path=str(suspicious)), profile.lora, seed)
    return load_base(profile.model, path=str(suspicious))


def load_variant(profile, access, suspicious, folder):
    """Load a trained variant for evaluation, its adapter merged into what it was trained on, in the profile's dtype."""
    if not (Path(folder) / "adapter_config.json").exists():
        return load_base(profile.model, path=str(folder))
    base = load_base(profile.model, path=None if access == "adapter" else str(suspicious))
    return with_adapter(base, folder).merge_and_unload().eval()


def train_variant(profile, access, suspicious, rows, prompt_format, seed, folder):
    """Train one variant on `rows` from the suspicious model and write it to `folder`.

    Both members of a pair are called with the same seed: equal initial probes, so that Δᵢ holds nothing but training.

    Returns:
        the training record of `finetune`.
    """
    model = start_variant(profile, access, suspicious, seed)
    record = finetune(model, rows, prompt_format, profile.access(access).vaccine, seed, profile.lengths.train_tokens)
    save(model, folder)
    return record
