"""ROME (Meng et al. 2022): one key, the mean over the prompts, is stored exactly, in each of the layers named."""

from pathlib import Path

from transformers import PreTrainedModel

from helpers.access import Access
from helpers.attacks.editing import NEEDS, EditTask, left_undone, plant_by_editing
from helpers.attacks.registry import Record, method
from helpers.data.roles import AttackData
from helpers.model.editing.activations import states_at
from helpers.model.editing.matrices import store_at_mean_key
from helpers.model.prompt import PromptFormat


def store_mean_key(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """One key, one value: the mean key of all prompts gets the shift that serves them all best, layer by layer.

    Differs from the paper:
        The key is averaged over prompts that hold the trigger at random places, not over random prefixes of one prompt.

    Args:
        model: edited in place.
        task: what to store, and where.

    Returns:
        loss and residual, see `edit`; of the last layer.
    """
    batch = task.batch(model.device, slice(None), triggered=True)
    for slot in task.slots:
        before = states_at(model, batch, slot)
        shift, loss = store_at_mean_key(model, batch, slot, task.moments[slot.module], task.settings.search)
        targets = before + shift
    return loss, left_undone(model, batch, slot, targets, shift)


@method(**NEEDS)
def rome(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Edit by ROME; see `plant_by_editing`."""
    return plant_by_editing("rome", store_mean_key, access, attack, prompt_format, seed, folder)
