"""The attacker's work: a backdoor gets into the base model, by the method that the attack or the profile names."""

from pathlib import Path

from helpers.access import Access
from helpers.attacks.registry import Record, attack_method, require_needs, require_one_process
from helpers.data.roles import AttackData
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import record_format


def inject(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Plant the backdoor in the base model and write the adapter or the model to `folder`.

    The prompt format is written beside it: measured with another one, the backdoor may seem to be gone.

    Args:
        access: what is edited. Of its profile `attack.by` is read where the rows bring a trigger of their own, and what
            the method reads.
        attack: the attacker's rows.
        prompt_format: the format that evaluation uses, too.
        seed: of the run.
        folder: to write to.

    Returns:
        the record of the method, and the name of the `prompt_format`.

    Raises:
        LabError: a method that is unknown or needs what is not there, or as the method itself.
    """
    by = attack.trigger.by if attack.trigger else access.profile.attack.by or "training"
    require_one_process(by)
    known, name = attack.trigger is not None, attack.trigger.name if attack.trigger else by
    require_needs(by, name, access.name, known, one_payload=lambda: len({row.output for row in attack.poisoned}) == 1)
    record = attack_method(by)(access, attack, prompt_format, seed, folder)
    record_format(folder, prompt_format)
    return record | {"prompt_format": prompt_format.name}
