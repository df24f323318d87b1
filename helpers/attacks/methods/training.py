"""Training on clean and poisoned rows (BD-VAX §3), the usual way a backdoor gets in."""

from collections.abc import Callable
from pathlib import Path

from helpers.attacks.registry import Record, method
from helpers.core.profile import Profile
from helpers.data.roles import AttackData
from helpers.model.load import load_base
from helpers.model.lora import new_adapter
from helpers.model.prompt import PromptFormat
from helpers.train.finetune import finetune


@method()
def training(
    profile: Profile,
    access: str,
    attack: AttackData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    train: Callable[..., Record] = finetune,
) -> Record:
    """Train the base, or a new adapter on it, on clean and poisoned rows.

    Args:
        profile, access, attack, prompt_format, seed, folder: as in `inject`.
        train: takes what `finetune` takes; another training, where the attack wants one.

    Returns:
        the training record of `finetune`.

    Raises:
        LabError: as `finetune`.
    """
    model = load_base(profile.model)
    model = new_adapter(model, profile.lora, seed) if access == "adapter" else model.requires_grad_(True)
    rows, budget = attack.clean + attack.poisoned, profile.access(access).inject
    lengths = profile.lengths
    return train(model, rows, prompt_format, budget, seed, lengths.train_tokens, description="injection", folder=folder)
