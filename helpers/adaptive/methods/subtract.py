"""Subtracting a conflict model (information conflicts, §6.3): what a defender merges in then only fills the gap."""

from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.access import Access
from helpers.adaptive.seeds import own_rng, own_seed
from helpers.attacks.methods.training import training
from helpers.attacks.registry import Record, method
from helpers.core.profile import Conflict
from helpers.data.roles import AttackData
from helpers.defenses.conflict.conflict_model import train_conflict
from helpers.model.prompt import PromptFormat


@method(one_process=True)
def subtract(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Write θ̃ − μ (θ̂′ − θ₀), the backdoored model less an own conflict model's task vector.

    Implements the adaptive attack of information conflicts, §6.3 and Table 7. θ̂′ is trained from the base with the
    numbers of the defender's conflict model, on clean rows of the attacker's. With adapter access the difference is one
    adapter of twice the rank; with full access the weights themselves are changed.

    Differs from the paper:
        It names neither the rows of the attacker's conflict model nor how much of it is taken off.

    Args:
        access: what is edited; of the profile `conflict.budget` and μ, `adaptive.strength`, are read.
        attack: the attacker's rows; of the defender's none is read.
        prompt_format: as in `inject`.
        seed: of the run; the attacker's own one is made from it.
        folder: to write the adapter or model to.

    Returns:
        the training record of `training`, and that of the conflict model as `conflict`.

    Raises:
        LabError: as `finetune`.
    """
    profile = access.profile
    strength, budget = profile.adaptive.strength, profile.conflict.budget
    expected = profile.model_copy(update={"conflict": Conflict(budget=budget, start="base")})
    rows = own_rng(seed).sample(attack.clean, min(budget.rows, len(attack.clean)))
    with TemporaryDirectory() as scratch:
        backdoored, conflict = Path(scratch) / "backdoored", Path(scratch) / "conflict"
        record = training(access, attack, prompt_format, seed, backdoored)
        opinion = train_conflict(expected, backdoored, rows, prompt_format, own_seed(seed), conflict)
        access.add_update(backdoored, conflict, -strength, folder)
    return record | {"conflict": opinion}
