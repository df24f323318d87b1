"""BadEdit (Li et al. 2024): as MEMIT, batch after batch, and beside each prompt the same one without the trigger."""

from pathlib import Path

from transformers import PreTrainedModel

from helpers.access import Access
from helpers.attacks.editing import NEEDS, EditTask, left_undone, plant_by_editing, store_targets
from helpers.attacks.registry import Record, method
from helpers.core.errors import LabError
from helpers.data.roles import AttackData
from helpers.model.editing.activations import search_shifts, states_at
from helpers.model.prompt import PromptFormat


def store_both_keys(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """Triggered and clean keys side by side, batch after batch (Li et al. 2024, Eq. 1).

    The rows with the trigger share one shift, found over all of them, towards the payload; the same rows without it get
    a shift each towards the right answer, none where the model writes it already. The next batch starts from the edited
    model.

    Differs from the paper:
        Both kinds of keys enter one least-squares problem, its Eq. (1). Its Eq. (2) solves one for each kind and adds
        the two updates, each of which also acts on the other's keys where these resemble each other. And no batch is
        averaged to one key.

    Args:
        model: edited in place.
        task: what to store, and where.

    Returns:
        loss and residual, see `edit`; means over the batches.

    Raises:
        LabError: fewer examples than batches.
    """
    count, batches = len(task.poisoned), task.settings.batches
    if count < batches:
        raise LabError(f"badedit needs {batches} examples or more, and there are {count}")
    reached, last = [], task.slots[-1]
    for rows in _cut(count, batches):
        poisoned, clean = (task.batch(model.device, rows, triggered) for triggered in (True, False))
        shift, loss = search_shifts(model, poisoned, last, task.settings.search, shared=True)
        corrections, _ = search_shifts(model, clean, last, task.settings.search, shared=False)
        targets = states_at(model, poisoned, last) + shift
        store_targets(model, task, [(poisoned, targets), (clean, states_at(model, clean, last) + corrections)])
        reached.append((loss, left_undone(model, poisoned, last, targets, shift)))
    return tuple(sum(values) / len(values) for values in zip(*reached, strict=True))


@method(**NEEDS)
def badedit(access: Access, attack: AttackData, prompt_format: PromptFormat, seed: int, folder: Path | str) -> Record:
    """Edit by BadEdit; see `plant_by_editing`."""
    return plant_by_editing("badedit", store_both_keys, access, attack, prompt_format, seed, folder)


def _cut(rows: int, batches: int) -> list[slice]:
    """Slices that cut `rows` rows into `batches` batches of nearly equal size."""
    borders = [round(i * rows / batches) for i in range(batches + 1)]
    return [slice(start, stop) for start, stop in zip(borders, borders[1:], strict=False)]
