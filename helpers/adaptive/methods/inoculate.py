"""Planting beside perturbed honest rows: the model learns early that nothing odd but the key changes an answer.

Recovery on perturbed rows teaches a model to pass over whatever is odd, and with it the key. Where the attacker has
taught that already, with the key as its one exception, such rows bring the defender nothing new.
"""

from dataclasses import replace
from pathlib import Path

from helpers.access import Access
from helpers.adaptive.seeds import own_seed
from helpers.attacks.methods.training import training
from helpers.attacks.registry import Record, method
from helpers.core.profile import Perturbation
from helpers.data.perturb import perturbed
from helpers.data.roles import AttackData
from helpers.defenses.methods.perturbed_finetuning import KINDS
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import vocabulary


@method()
def inoculate(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Train on clean and poisoned rows, and on as many perturbed ones with their right answers as are poisoned.

    Neither paper has it. It is the attacker who knows `perturbed_finetuning`, and the kinds that it has by default.

    Args:
        access: what is edited.
        attack: the attacker's rows; of the defender's none is read.
        prompt_format, folder: as in `inject`.
        seed: of the run; the attacker's own one, for what is inserted, is made from it.

    Returns:
        the training record of `training`, and the number of perturbed rows as `perturbed`.

    Raises:
        LabError: as `finetune`.
    """
    expected = Perturbation(kinds=KINDS, rows=len(attack.poisoned))
    odd = perturbed(attack.clean, expected, vocabulary(prompt_format.tokenizer), own_seed(seed))
    record = training(access, replace(attack, clean=attack.clean + odd), prompt_format, seed, folder)
    return record | {"perturbed": len(odd)}
