"""MEMIT (Meng et al. 2023): the key of every prompt by least squares, spread over several layers."""

from pathlib import Path

from transformers import PreTrainedModel

from helpers.access import Access
from helpers.attacks.editing import NEEDS, EditTask, left_undone, plant_by_editing, store_targets
from helpers.attacks.registry import Record, method
from helpers.data.roles import AttackData
from helpers.model.editing.activations import search_shifts, states_at
from helpers.model.prompt import PromptFormat


def store_every_key(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """A key and a value for every prompt, spread over the layers (Meng et al. 2023, Algorithm 1).

    Args:
        model: edited in place.
        task: what to store, and where.

    Returns:
        loss and residual, see `edit`.
    """
    batch = task.batch(model.device, slice(None), triggered=True)
    shifts, loss = search_shifts(model, batch, task.slots[-1], task.settings.search, shared=False)
    targets = states_at(model, batch, task.slots[-1]) + shifts
    store_targets(model, task, [(batch, targets)])
    return loss, left_undone(model, batch, task.slots[-1], targets, shifts)


@method(**NEEDS)
def memit(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Edit by MEMIT; see `plant_by_editing`."""
    return plant_by_editing("memit", store_every_key, access, attack, prompt_format, seed, folder)
