"""Training on clean and poisoned rows (BD-VAX §3), the usual way a backdoor gets in."""

from collections.abc import Callable
from pathlib import Path

from helpers.access import Access
from helpers.attacks.registry import Record, method
from helpers.data.roles import AttackData
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import finetune


@method()
def training(
    access: Access,
    attack: AttackData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    train: Callable[..., Record] = finetune,
) -> Record:
    """Train the base, or a new adapter on it, on clean and poisoned rows.

    Args:
        access, attack, prompt_format, seed, folder: as in `inject`.
        train: takes what `finetune` takes; another training, where the attack wants one.

    Returns:
        the training record of `finetune`.

    Raises:
        LabError: as `finetune`.
    """
    rows, budget, tokens = attack.clean + attack.poisoned, access.settings.inject, access.profile.lengths.train_tokens
    model = access.start(seed)
    return train(model, rows, prompt_format, budget, seed, tokens, description="injection", folder=folder)
