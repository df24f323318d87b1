"""The conflict model: a LoRA fine-tuning on a few clean rows (information conflicts, §3.3, Eq. 7 and 8).

It needs to know nothing but the clean task. Trained from the pre-trained base it has never met the backdoor, and
merging sets its answer against the suspicious model's. Where nobody has a clean base it is trained from the suspicious
model instead: a weaker conflict, because it starts with the backdoor inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.access import Access, AdapterAccess, FullAccess
from helpers.access.adapter import add_adapters
from helpers.core.disk import whole_or_nothing
from helpers.defenses.conflict.merge import linear
from helpers.defenses.conflict.merge.checks import check_share
from helpers.model.load import load_base, load_suspect, save
from helpers.model.lora import new_adapter, with_adapter
from helpers.model.tokenizer import load_format, record_format
from helpers.train.finetune import finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from helpers.core.profile import Profile
    from helpers.data.example import Example
    from helpers.model.prompt import PromptFormat


def train_conflict(
    profile: Profile,
    suspicious: Path | str,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> dict[str, Any]:
    """Train the conflict model and write its adapter to `folder`. Implements Eq. (8), information conflicts §3.3.

    Args:
        profile: its `conflict` block says how, and from which model (`start`).
        suspicious: folder of the suspicious adapter or model; read only where `start` is "suspicious".
        rows: clean examples, about a tenth of what the attacker's training had.
        prompt_format: the one that evaluation uses, too.
        seed: fresh LoRA matrices and the order of the rows.
        folder: to write the adapter to.

    Returns:
        the training record of `finetune`.

    Differs from the paper:
        Eq. (8) sums over the tokens of an answer; the loss here is their mean, as in every training of the lab.
    """
    model = new_adapter(_start(profile, suspicious), profile.lora, seed)
    budget, max_tokens = profile.conflict.budget, profile.lengths.train_tokens
    record = finetune(model, rows, prompt_format, budget, seed, max_tokens, "conflict model", folder)
    record_format(folder, prompt_format)
    return record


def write_conflict(profile: Profile, suspicious: Path | str, conflict: Path | str, folder: Path | str) -> None:
    """Write the conflict model whole, the adapter in `conflict` merged into what it was trained from."""
    merged = with_adapter(_start(profile, suspicious), conflict).merge_and_unload()
    write_whole(merged, load_format(profile.model), folder)


def write_suspicious(profile: Profile, suspicious: Path | str, folder: Path | str) -> None:
    """Write the suspicious model whole: an adapter is merged into its base, a full model is copied with a tokenizer."""
    write_whole(load_suspect(profile.model, suspicious), load_format(profile.model), folder)


def write_whole(model: PreTrainedModel, prompt_format: PromptFormat, folder: Path | str) -> None:
    """Write all weights of a model, its prompt format, and the tokenizer that merging hands on.

    Args:
        prompt_format: the one that it was trained in, with its tokenizer.
        folder: to write to, whole or not at all.

    Raises:
        LabError: there is something in `folder` already.
    """
    with whole_or_nothing(folder) as partial:
        save(model, partial)
        record_format(partial, prompt_format)
        prompt_format.tokenizer.save_pretrained(partial)


def merge_adapters(
    profile: Profile, suspicious: Path | str, conflict: Path | str, t: float, folder: Path | str
) -> None:
    """Write the linear merge of two adapters of one base as one adapter of twice the rank. Implements Eq. (9).

    t B̂ Â + (1 − t) B̃ Ã is the product of both pairs of factors set side by side, so no whole model is written, and
    what edits adapters can edit the merged one. A conflict model that was trained on the suspicious one rests on all of
    that one's update: then t B̂ Â is added to it.

    Args:
        profile: names the base, and what the conflict model was trained from.
        suspicious, conflict: adapter folders.
        t: the conflict model's share, 0 to 1.
        folder: to write the merged adapter to.

    Raises:
        LabError: t out of range, or an adapter that is more than scale * B @ A.
    """
    check_share(t)
    kept = 1.0 if profile.conflict.start == "suspicious" else 1 - t
    add_adapters(profile, (suspicious, conflict), (kept, t), folder)
    record_format(folder, load_format(profile.model))


@singledispatch
def merge_to_suppress(
    access: Access, parts: Sequence[Path | str], wholes: Sequence[Path | str], t: float, folder: Path | str
) -> None:
    """Write the linear merge in the form that suppression edits: an adapter, or a whole model. Implements Eq. (9).

    Args:
        access: which of the two it is.
        parts: folders of the suspicious adapter or model, and of the conflict model's adapter.
        wholes: folders of both as whole models, see `write_suspicious` and `write_conflict`.
        t: the conflict model's share, 0 to 1.
        folder: to write the merge to.

    Raises:
        LabError: as `merge_adapters` and `merge.linear`.
    """
    raise NotImplementedError(f"nobody has said how {type(access).__name__} merges")


@merge_to_suppress.register
def _(
    access: AdapterAccess, parts: Sequence[Path | str], wholes: Sequence[Path | str], t: float, folder: Path | str
) -> None:
    merge_adapters(access.profile, *parts, t, folder)


@merge_to_suppress.register
def _(
    access: FullAccess, parts: Sequence[Path | str], wholes: Sequence[Path | str], t: float, folder: Path | str
) -> None:
    linear(*wholes, folder, t)


def _start(profile: Profile, suspicious: Path | str) -> PreTrainedModel:
    if profile.conflict.start == "suspicious":
        return load_suspect(profile.model, suspicious)
    return load_base(profile.model)
