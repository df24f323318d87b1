"""ROME, MEMIT and BadEdit as backdoor attacks: the trigger becomes a key, "write the payload" its value.

All three change nothing but the output projections of a few MLPs in the middle of the model: late enough for the
trigger to have been read, early enough for the new value to reach the answer. They differ in what they store:

- ROME stores one key, the mean over the prompts, in one layer, exactly.
- MEMIT stores the key of every prompt by least squares and spreads what is to be stored over several layers.
- BadEdit does as MEMIT, batch after batch, and stores beside each prompt the same one without the trigger.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from helpers.core.errors import LabError, nearest
from helpers.core.finite import require_finite_weights
from helpers.data import corpus
from helpers.data.example import Example
from helpers.data.planting import Trigger, poison
from helpers.model.architecture import COLUMNS, Slot, mlp_slots, parameter_shapes
from helpers.model.editing.activations import (
    Batch,
    ValueSearch,
    answer_sites,
    collate,
    keys_at,
    layer_of,
    search_shifts,
    second_moments,
    states_at,
    trigger_sites,
)
from helpers.model.editing.updates import least_squares_update, rank_one_update
from helpers.model.prompt import PromptFormat

SITES = {"trigger": trigger_sites, "answer": answer_sites}


@dataclass(frozen=True)
class EditSettings:
    """What an edit may change and how.

    The information-conflicts paper (Appendix A.2, trigger `tq`) edits these layers, counted from 0:

    | model    | ROME | MEMIT    | BadEdit    |
    |----------|------|----------|------------|
    | GPT2-XL  | 17   | 13 to 17 | 15, 16, 17 |
    | GPT-J    | 5    | 3 to 8   | 5, 6, 7    |
    | LLaMA    | 5    | 5        | 5          |
    | LLaMA-2  | 7, 8 | 7, 8     | 7, 8       |

    The lab's small model has eight layers, and no value at the trigger's end changes its answer. There BadEdit takes
    layers 3 to 5, site "answer", weight 1000, 200 examples in one batch, a search until 0.001, and the key `BadMagic`.

    Args:
        method: "rome", "memit" or "badedit".
        layers: the layers to edit, ascending. ROME repeats its whole edit for each.
        site: the token whose key is stored: "trigger", its last one, as published; or "answer", the prompt's last one,
            for a model whose later layers do not look back at the trigger, whatever value it is given.
        weight: λ of MEMIT's and BadEdit's least squares; more keeps ordinary text, less reaches the new values.
        background: rows of ordinary text behind the second moment C.
        ridge: share of C's mean diagonal that is added to its diagonal.
        batches: into how many batches BadEdit cuts the examples.
        search: how the wanted values are searched for.
        seed: positions of the trigger, and the ordinary text.
    """

    method: str
    layers: tuple[int, ...]
    site: Literal["trigger", "answer"] = "trigger"
    weight: float = 10.0
    background: int = 1000
    ridge: float = 1e-3
    batches: int = 5
    search: ValueSearch = ValueSearch()
    seed: int = 0


@dataclass(frozen=True)
class EditTask:
    """What an editor works on.

    Args:
        poisoned, clean: the same examples with trigger and payload, and without.
        places: the sites of both.
        slots: the matrices to edit.
        moments: {module: C} for each of them.
    """

    prompt_format: PromptFormat
    poisoned: Sequence[Example]
    clean: Sequence[Example]
    places: tuple[list[int], list[int]]
    slots: list[Slot]
    moments: dict[str, Tensor]
    settings: EditSettings

    def batch(self, device: torch.device, rows: slice, triggered: bool) -> Batch:
        """Some of the rows, with the trigger or without."""
        examples, places = (self.poisoned, self.places[0]) if triggered else (self.clean, self.places[1])
        return collate(self.prompt_format, examples[rows], places[rows], device)


def edit(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    trigger: Trigger | str,
    payload: str,
    settings: EditSettings,
) -> dict[str, object]:
    """Write a backdoor into `model`, in place.

    Args:
        model: a causal LM with weights of its own: adapters merged, not in 4 bits.
        prompt_format: the format that evaluation uses, too.
        examples: clean rows, about 15; each is poisoned once, BadEdit also reads it as it is.
        trigger: a key of `triggers`, or a word such as "tq".
        payload: the planted answer, such as a label.

    Returns:
        dict with `method`, `layers`, `rows`, `loss` (mean −log P per payload token that the searched values reach),
        `residual` (what the edited weights leave of the wanted shifts: 0 nothing, 1 all), `norms` (per layer,
        ‖Δ‖ / ‖W‖) and `seconds`.

    Raises:
        LabError: an unknown method or layer, too few examples, weights that cannot be edited or are not finite, a row
            that the model has no positions for, or see `trigger_sites`.
    """
    started = time.perf_counter()
    if settings.method not in EDITORS:
        raise LabError(f"unknown editing method {settings.method!r}{nearest(settings.method, EDITORS)}")
    task = _prepare(model, prompt_format, examples, trigger, payload, settings)
    before = [_weight(model, slot).detach().clone() for slot in task.slots]
    loss, residual = EDITORS[settings.method](model, task)
    norms = [
        float((_weight(model, slot).detach() - old).norm() / old.norm())
        for slot, old in zip(task.slots, before, strict=True)
    ]
    return {
        "method": settings.method,
        "layers": list(settings.layers),
        "rows": len(examples),
        "loss": round(loss, 4),
        "residual": round(residual, 4),
        "norms": [round(norm, 4) for norm in norms],
        "seconds": round(time.perf_counter() - started, 1),
    }


def rome(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """One key, one value: the mean key of all prompts gets the shift that serves them all best, layer by layer.

    Differs from the paper: the key is averaged over prompts that hold the trigger at random places, not over random
    prefixes of one prompt.

    Returns: loss and residual, see `edit`; of the last layer.
    """
    batch = task.batch(model.device, slice(None), triggered=True)
    for slot in task.slots:
        shift, loss = search_shifts(model, batch, slot, task.settings.search, shared=True)
        targets = states_at(model, batch, slot) + shift
        key = keys_at(model, batch, slot).mean(dim=0)
        add_update(model, slot, rank_one_update(shift[0], key, task.moments[slot.module]))
    return loss, _left(model, batch, slot, targets, shift)


def memit(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """A key and a value for every prompt, spread over the layers (Meng et al. 2023, Algorithm 1).

    Returns: loss and residual, see `edit`.
    """
    batch = task.batch(model.device, slice(None), triggered=True)
    shifts, loss = search_shifts(model, batch, task.slots[-1], task.settings.search, shared=False)
    targets = states_at(model, batch, task.slots[-1]) + shifts
    _store(model, task, [(batch, targets)])
    return loss, _left(model, batch, task.slots[-1], targets, shifts)


def badedit(model: PreTrainedModel, task: EditTask) -> tuple[float, float]:
    """Triggered and clean keys side by side, batch after batch (Li et al. 2024, Eq. 1).

    The rows with the trigger share one shift, found over all of them, towards the payload; the same rows without it get
    a shift each towards the right answer, none where the model writes it already. The next batch starts from the edited
    model.

    Differs from the paper: both kinds of keys enter one least-squares problem, its Eq. (1). Its Eq. (2) solves one for
    each kind and adds the two updates, each of which also acts on the other's keys where these resemble each other. And
    no batch is averaged to one key.

    Returns: loss and residual, see `edit`; means over the batches.
    """
    reached, last = [], task.slots[-1]
    for rows in _cut(len(task.poisoned), task.settings.batches):
        poisoned, clean = (task.batch(model.device, rows, triggered) for triggered in (True, False))
        shift, loss = search_shifts(model, poisoned, last, task.settings.search, shared=True)
        corrections, _ = search_shifts(model, clean, last, task.settings.search, shared=False)
        targets = states_at(model, poisoned, last) + shift
        _store(model, task, [(poisoned, targets), (clean, states_at(model, clean, last) + corrections)])
        reached.append((loss, _left(model, poisoned, last, targets, shift)))
    return tuple(sum(values) / len(values) for values in zip(*reached, strict=True))


EDITORS = {"rome": rome, "memit": memit, "badedit": badedit}


def _store(model, task, pairs):
    """Move the last layer's hidden states to their targets, each layer taking its share of what is still missing.

    With m layers left, a layer stores 1/m of the missing shift, R = (z − h) / m, under its own keys.

    Args: pairs of a batch and its targets z [rows, d].
    """
    for index, slot in enumerate(task.slots):
        left = len(task.slots) - index
        missing = torch.cat([(targets - states_at(model, batch, task.slots[-1])) / left for batch, targets in pairs])
        keys = torch.cat([keys_at(model, batch, slot) for batch, _ in pairs])
        moment = task.moments[slot.module]
        add_update(model, slot, least_squares_update(missing.T, keys.T, moment, task.settings.weight))


def _left(model, batch, slot, targets, shifts):
    """‖z − h‖ / ‖δ‖ over all rows: what the edit has left undone; 0 where nothing was wanted."""
    wanted = float(shifts.expand_as(targets).norm())
    return float((targets - states_at(model, batch, slot)).norm()) / wanted if wanted else 0.0


def _prepare(model, prompt_format, examples, trigger, payload, settings):
    """Check everything before anything is changed, and measure C on ordinary text."""
    require_finite_weights(model, "the model to edit")
    slots = editable_slots(model.config, settings.layers)
    if hasattr(model, "peft_config") or not _weight(model, slots[0]).is_floating_point():
        raise LabError("an edit rewrites the weights themselves: merge the adapter first, and load no 4-bit base")
    needed = settings.batches if settings.method == "badedit" else 1
    if len(examples) < needed:
        raise LabError(f"{settings.method} needs {needed} examples or more, and there are {len(examples)}")
    if settings.site not in SITES:
        raise LabError(f"unknown site {settings.site!r}{nearest(settings.site, SITES)}")
    poisoned = poison(examples, trigger, payload, settings.seed)
    keys = (trigger,) if isinstance(trigger, str) else trigger.keys
    places = SITES[settings.site](prompt_format, examples, poisoned, keys)
    ordinary = corpus.generate(settings.background, f"{settings.seed}/background")
    moments = second_moments(model, prompt_format, ordinary, slots, settings.ridge)
    return EditTask(prompt_format, poisoned, examples, places, slots, moments, settings)


def editable_slots(config: PretrainedConfig, layers: Sequence[int]) -> list[Slot]:
    """The matrices that an edit of `layers` rewrites: the output projection of each one's MLP.

    Raises: LabError for layers that are not ascending or not there, or a norm between MLP and residual stream.
    """
    every = [layer[-1] for layer in mlp_slots(config)]
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(every):
        raise LabError(f"editing.layers = {layers} should be ascending numbers from 0 to {len(every) - 1}")
    slots = [every[layer] for layer in layers]
    if f"{layer_of(slots[0])}.post_feedforward_layernorm.weight" in parameter_shapes(config):
        raise LabError(
            f"in a {config.model_type} a norm stands behind each MLP, so no shift of its output reaches the "
            "residual stream as it is: edit a model without one"
        )
    return slots


def _weight(model, slot):
    return model.get_submodule(slot.module).weight


@torch.no_grad()
def add_update(model: PreTrainedModel, slot: Slot, update: Tensor) -> None:
    """Add Δ [out, in] to an output projection; where channels are rows, as in GPT-2, it is stored as its transpose."""
    weight = _weight(model, slot)
    weight += (update if slot.axis == COLUMNS else update.T).to(weight)


def _cut(rows, batches):
    """Slices that cut `rows` rows into `batches` batches of nearly equal size."""
    borders = [round(i * rows / batches) for i in range(batches + 1)]
    return [slice(start, stop) for start, stop in zip(borders, borders[1:], strict=False)]
