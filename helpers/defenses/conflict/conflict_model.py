"""The conflict model: a LoRA fine-tuning on a few clean rows (information conflicts, §3.3, Eq. 7 and 8).

It needs to know nothing but the clean task. Trained from the pre-trained base it has never met the backdoor, and
merging sets its answer against the suspicious model's. Where nobody has a clean base it is trained from the suspicious
model instead: a weaker conflict, because it starts with the backdoor inside.
"""

from peft.tuners.lora import LoraLayer

from helpers.defenses.conflict.merge.checks import check_share
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import adapter_tensors, add_adapter, new_adapter, save_adapter, with_adapter
from helpers.model.shards import complete
from helpers.model.tokenizer import load_format, load_tokenizer, record_format
from helpers.train.finetune import finetune


def train_conflict(profile, suspicious, rows, prompt_format, seed, folder):
    """Train the conflict model and write its adapter to `folder`. Implements Eq. (8), information conflicts §3.3.

    Args:
        profile: `core.profile.Profile`; its `conflict` block says how, and from which model (`start`).
        suspicious: folder of the suspicious adapter or model; read only where `start` is "suspicious".
        rows: clean examples, about a tenth of what the attacker's training had.
        seed: fresh LoRA matrices and the order of the rows.

    Returns:
        the training record of `finetune`.

    Differs from the paper: Eq. (8) sums over the tokens of an answer; the loss here is their mean, as in every training
    of the lab.
    """
    model = new_adapter(_start(profile, suspicious), profile.lora, seed)
    budget, max_tokens = profile.conflict.budget, profile.lengths.train_tokens
    record = finetune(model, rows, prompt_format, budget, seed, max_tokens, "conflict model", folder)
    record_format(folder, prompt_format)
    return record


def write_conflict(profile, suspicious, conflict, folder):
    """Write the conflict model whole, the adapter in `conflict` merged into what it was trained from."""
    _write_whole(profile, with_adapter(_start(profile, suspicious), conflict).merge_and_unload(), folder)


def write_suspicious(profile, suspicious, folder):
    """Write the suspicious model whole: an adapter is merged into its base, a full model is copied with a tokenizer."""
    _write_whole(profile, load_suspect(profile.model, suspicious), folder)


def merge_adapters(profile, suspicious, conflict, t, folder):
    """Write the linear merge of two adapters of one base as one adapter of twice the rank. Implements Eq. (9).

    t B̂ Â + (1 − t) B̃ Ã is the product of both pairs of factors set side by side, so no whole model is written, and
    what edits adapters can edit the merged one. A conflict model that was trained on the suspicious one rests on all of
    that one's update: then t B̂ Â is added to it.

    Args:
        suspicious, conflict: adapter folders.
        t: the conflict model's share, 0 to 1.
        folder: to write the merged adapter to.
    Raises: LabError for t out of range, or an adapter that is more than scale * B @ A.
    """
    check_share(t)
    kept = 1.0 if profile.conflict.start == "suspicious" else 1 - t
    add_adapters(profile, suspicious, conflict, (kept, t), folder)
    record_format(folder, load_format(profile.model))


def add_adapters(profile, first, second, weights, folder):
    """Write the weighted sum of two adapters of one base as one adapter, whose rank is the sum of theirs.

    Every scale goes into the factors: the sum is a plain adapter of scale 1, whatever its parts were.

    Args:
        first, second: adapter folders.
        weights: of the two; a negative one takes an adapter off.
        folder: to write the sum to.
    """
    model = with_adapter(load_base(profile.model), first)
    add_adapter(model, second, "second")
    for name, config in model.peft_config.items():
        _name_matrices(model, name, config)
        config.use_rslora = False  # PEFT hands it on to the sum, where the root of the rank would scale it once more
    model.add_weighted_adapter(["default", "second"], list(weights), "sum", combination_type="cat")
    save_adapter(model.peft_config["sum"], adapter_tensors(model, "sum"), folder)


def _name_matrices(model, name, config):
    """Let an adapter's settings name its matrices one by one: PEFT joins neither patterns nor choices of layers."""
    base = model.get_base_model()
    config.target_modules = {
        place for place, layer in base.named_modules() if isinstance(layer, LoraLayer) and name in layer.lora_A
    }
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _start(profile, suspicious):
    if profile.conflict.start == "suspicious":
        return load_suspect(profile.model, suspicious)
    return load_base(profile.model)


def _write_whole(profile, model, folder):
    """Write a model and the tokenizer that merging hands on."""
    with complete(folder) as partial:
        save(model, partial)
        record_format(partial, load_format(profile.model))
        load_tokenizer(profile.model).save_pretrained(partial)
