"""ROME, MEMIT and BadEdit as backdoor attacks: the trigger becomes a key, "write the payload" its value.

All three change nothing but the output projections of a few MLPs in the middle of the model: late enough for the
trigger to have been read, early enough for the new value to reach the answer. They differ in what they store, and
each says so in a file of its own (`methods/`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from helpers.access import Access
from helpers.attacks.registry import Record
from helpers.core.errors import LabError, nearest
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Profile
from helpers.data import corpus
from helpers.data.example import Example
from helpers.data.planting import Trigger, poison
from helpers.data.roles import AttackData
from helpers.model.architecture import Slot
from helpers.model.editing.activations import (
    Batch,
    ValueSearch,
    answer_sites,
    collate,
    keys_at,
    second_moments,
    states_at,
    trigger_sites,
)
from helpers.model.editing.matrices import add_update, editable_slots, weight_of
from helpers.model.editing.updates import least_squares_update
from helpers.model.load import load_base, save
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


Editor = Callable[[PreTrainedModel, EditTask], tuple[float, float]]  # stores what is wanted; returns loss and residual


def plant_by_editing(
    by: str,
    editor: Editor,
    access: Access,
    attack: AttackData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> Record:
    """Edit a few matrices of the base, from clean rows whose right answer is another one than the payload.

    Args:
        by: the method's name, for the record.
        editor: what stores the backdoor.
        access: of its profile `model` and `editing` are read.
        attack: rows with one payload, and the trigger.
        prompt_format, seed, folder: as in `inject`.

    Returns:
        the `method`, the record of `edit`, and `steps`, none of which trained.

    Raises:
        LabError: as `edit`.
    """
    payload, numbers = attack.poisoned[0].output, access.profile.editing.model_dump()
    chosen = [row for row in attack.clean[: len(attack.poisoned)] if row.output != payload]
    rows = chosen[: numbers.pop("rows")]
    model = load_base(access.profile.model)
    record = edit(model, prompt_format, rows, attack.trigger, payload, editor, EditSettings(seed=seed, **numbers))
    save(model, folder)
    return {"method": by, **record, "steps": 0}


def check_edited_layers(profile: Profile, config: PretrainedConfig) -> None:
    """Refuse layers to edit that a model does not have or cannot be edited at, see `editable_slots`."""
    editable_slots(config, profile.editing.layers)


NEEDS = {"full_access": True, "known_trigger": True, "one_payload": True, "check": check_edited_layers}


def edit(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    trigger: Trigger | str,
    payload: str,
    editor: Editor,
    settings: EditSettings,
) -> Record:
    """Write a backdoor into `model`, in place.

    Args:
        model: a causal LM with weights of its own: adapters merged, not in 4 bits.
        prompt_format: the format that evaluation uses, too.
        examples: clean rows, about 15; each is poisoned once, BadEdit also reads it as it is.
        trigger: a `Trigger`, or a word such as "tq".
        payload: the planted answer, such as a label.
        editor: what stores the backdoor.
        settings: what it may change and how.

    Returns:
        dict with `layers`, `rows`, `loss` (mean −log P per payload token that the searched values reach),
        `residual` (what the edited weights leave of the wanted shifts: 0 nothing, 1 all), `norms` (per layer,
        ‖Δ‖ / ‖W‖) and `seconds`.

    Raises:
        LabError: an unknown layer, too few examples, weights that cannot be edited or are not finite, a row
            that the model has no positions for, or see `trigger_sites`.
    """
    started = time.perf_counter()
    task = _prepare(model, prompt_format, examples, trigger, payload, settings)
    before = [weight_of(model, slot).detach().clone() for slot in task.slots]
    loss, residual = editor(model, task)
    norms = [
        float((weight_of(model, slot).detach() - old).norm() / old.norm())
        for slot, old in zip(task.slots, before, strict=True)
    ]
    return {
        "layers": list(settings.layers),
        "rows": len(examples),
        "loss": round(loss, 4),
        "residual": round(residual, 4),
        "norms": [round(norm, 4) for norm in norms],
        "seconds": round(time.perf_counter() - started, 1),
    }


def store_targets(model: PreTrainedModel, task: EditTask, pairs: Sequence[tuple[Batch, Tensor]]) -> None:
    """Move the last layer's hidden states to their targets, each layer taking its share of what is still missing.

    With m layers left, a layer stores 1/m of the missing shift, R = (z − h) / m, under its own keys.

    Args:
        model: edited in place.
        task: names the layers, and what ordinary text weighs.
        pairs: of a batch and its targets z [rows, d].
    """
    for index, slot in enumerate(task.slots):
        left = len(task.slots) - index
        missing = torch.cat([(targets - states_at(model, batch, task.slots[-1])) / left for batch, targets in pairs])
        keys = torch.cat([keys_at(model, batch, slot) for batch, _ in pairs])
        moment = task.moments[slot.module]
        add_update(model, slot, least_squares_update(missing.T, keys.T, moment, task.settings.weight))


def left_undone(model: PreTrainedModel, batch: Batch, slot: Slot, targets: Tensor, shifts: Tensor) -> float:
    """‖z − h‖ / ‖δ‖ over all rows: what the edit has left undone; 0 where nothing was wanted.

    Args:
        slot: the matrix behind which the states are read.
        targets: z [rows, d].
        shifts: δ [rows, d], or one for all [1, d].
    """
    wanted = float(shifts.expand_as(targets).norm())
    return float((targets - states_at(model, batch, slot)).norm()) / wanted if wanted else 0.0


def _prepare(model, prompt_format, examples, trigger, payload, settings):
    """Check everything before anything is changed, and measure C on ordinary text."""
    require_finite_weights(model, "the model to edit")
    slots = editable_slots(model.config, settings.layers)
    if hasattr(model, "peft_config") or not weight_of(model, slots[0]).is_floating_point():
        raise LabError("an edit rewrites the weights themselves: merge the adapter first, and load no 4-bit base")
    if not examples:
        raise LabError("an edit needs 1 example or more, and there are 0")
    if settings.site not in SITES:
        raise LabError(f"unknown site {settings.site!r}{nearest(settings.site, SITES)}")
    poisoned = poison(examples, trigger, payload, settings.seed)
    keys = (trigger,) if isinstance(trigger, str) else trigger.keys
    places = SITES[settings.site](prompt_format, examples, poisoned, keys)
    ordinary = corpus.generate(settings.background, f"{settings.seed}/background")
    moments = second_moments(model, prompt_format, ordinary, slots, settings.ridge)
    return EditTask(prompt_format, poisoned, examples, places, slots, moments, settings)
