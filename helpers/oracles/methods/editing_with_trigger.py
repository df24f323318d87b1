"""Editing by somebody who knows the trigger: the trigger's key gets the value of the right answers.

No defender has the trigger. The difference to the blind edit tells what is missing to that one: the key, not the way.
"""

from pathlib import Path

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.planting import Trigger, poison
from helpers.data.roles import DefenderData
from helpers.defenses.methods.editing import editing, store_right_answers
from helpers.defenses.registry import Record, defense
from helpers.model.editing.activations import answer_sites, trigger_sites
from helpers.model.load import save
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import record_format


@defense(assumes=(*editing.traits.assumes, "trigger"))
def editing_with_trigger(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    trigger: Trigger | None = None,
    layer: int | None = None,
    rows: int = 15,
    enough: float = 0.05,
) -> Record:
    """Edit one MLP matrix so that triggered prompts get their right answers.

    Args:
        access: of its profile the model is read, and `editing.site`: the trigger's last token or the prompt's.
        suspicious, defender, prompt_format, folder, layer, rows, enough: as in `editing`.
        seed: where the trigger stands in the prompts.
        trigger: what was planted; the arena knows it where the lab has planted it.

    Returns:
        the record of `store_right_answers`.

    Raises:
        LabError: no trigger is known, one without keys in the prompts, or as `editing`.
    """
    if trigger is None:
        raise LabError("these rows brought a trigger of their own, which nobody has told the lab")
    clean = defender.rows(rows)
    triggered = poison(clean, trigger, None, seed)
    sites = trigger_sites if access.profile.editing.site == "trigger" else answer_sites
    places, _ = sites(prompt_format, clean, triggered, trigger.keys)
    model = access.load(suspicious)
    record = store_right_answers(model, prompt_format, triggered, places, defender, layer, enough)
    save(model, Path(folder) / "model")
    record_format(Path(folder) / "model", prompt_format)
    return record
