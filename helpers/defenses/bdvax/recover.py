"""Recovery: light fine-tuning on a few clean rows heals what suppression cut (BD-VAX §4.3).

Every control (fine-tuning alone, random channels, magnitude channels) goes through the same function with the same
rows, epochs and learning rate: the paper's Appendix C.2 shows that the learning rate alone can look like a defense.
"""

from helpers.model.load import load_base, save
from helpers.model.lora import with_adapter
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune


def recover(profile, access, weakened, rows, prompt_format, seed, folder):
    """Fine-tune a suppressed (or untouched) model on clean rows and write it to `folder`.

    Args:
        profile: `core.profile.Profile`; its `recover` budget for `access` is used.
        access: "adapter" trains the adapter in `weakened` over the frozen base, "full" all weights.
        weakened: folder of the adapter or model to start from.
        rows: clean examples.

    Returns:
        the training record of `finetune`, and the name of the `prompt_format`.
    """
    if access == "adapter":
        model = with_adapter(load_base(profile.model), weakened, trainable=True)
    else:
        model = load_base(profile.model, path=str(weakened))
    record = finetune(model, rows, prompt_format, profile.access(access).recover, seed, profile.lengths.train_tokens)
    save(model, folder)
    record_format(folder, prompt_format)
    return record | {"prompt_format": prompt_format.name}
