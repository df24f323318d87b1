"""Recovery: light fine-tuning on a few clean rows repairs what suppression took (BD-VAX §4.3).

Every control (fine-tuning alone, random channels, magnitude channels) goes through the same function with the same
rows, epochs and learning rate: the paper's Appendix C.2 shows that the learning rate alone can look like a defense.
What is inserted into the rows is the same for all of them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.data.perturb import perturbed
from helpers.model.tokenizer import record_format, vocabulary
from helpers.train.finetune import finetune

if TYPE_CHECKING:
    from transformers import Trainer

    from helpers.access import Access
    from helpers.data.example import Example
    from helpers.model.prompt import PromptFormat


def recovery_rows(access: Access, rows: Sequence[Example], prompt_format: PromptFormat, seed: int) -> Sequence[Example]:
    """The rows that a recovery trains on: the clean ones, perturbed where the access's `perturb` names any kind.

    Args:
        access: its `perturb` says what is inserted.
        rows: clean examples.
        prompt_format: its tokenizer's vocabulary gives the words.
        seed: of what is inserted, and where.
    """
    numbers = access.settings.perturb
    return perturbed(rows, numbers, vocabulary(prompt_format.tokenizer), seed) if numbers.kinds else rows


def at_rate(access: Access, lr: float | None) -> Access:
    """The same access whose recovery has another learning rate; None leaves it as it is."""
    if lr is None:
        return access
    return access.with_settings(recover=access.settings.recover.model_copy(update={"lr": lr}))


def recover(
    access: Access,
    weakened: Path | str,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    new_trainer: Callable[..., Trainer] | None = None,
) -> dict[str, Any]:
    """Fine-tune a suppressed (or untouched) model on clean rows and write it to `folder`.

    Args:
        access: says what trains, the adapter or all weights; its `recover` budget and `perturb` are used.
        weakened: folder of the adapter or model to start from.
        rows: clean examples.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows, and of what is inserted into them.
        folder: to write the recovered adapter or model to.
        new_trainer: see `finetune`.

    Returns:
        the training record of `finetune`, and the name of the `prompt_format`.
    """
    model, max_tokens = access.resume(weakened), access.profile.lengths.train_tokens
    trained = recovery_rows(access, rows, prompt_format, seed)
    record = finetune(model, trained, prompt_format, access.settings.recover, seed, max_tokens, new_trainer=new_trainer)
    access.save(model, folder)
    record_format(folder, prompt_format)
    return record | {"prompt_format": prompt_format.name}
