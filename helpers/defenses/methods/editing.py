"""Editing: ROME (Meng et al. 2022) as a defense, which writes the right answer where a wrong one may be stored.

It is blind: the defender knows no trigger, so what is stored under the mean key of clean prompts is a value that makes
their own right answers likelier. A model that is sure of them already leaves nothing to store, and stays as it is.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.core.finite import require_finite_weights
from helpers.data.example import Example
from helpers.data.roles import DefenderData
from helpers.defenses.registry import Record, defense
from helpers.model.editing.activations import ValueSearch, answer_sites, collate, second_moments
from helpers.model.editing.matrices import editable_slots, store_at_mean_key, weight_of
from helpers.model.load import save
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import record_format

BACKGROUND = 1000  # the most clean rows behind C, as in the attacks by editing
RIDGE = 1e-3  # share of C's mean diagonal that is added to its diagonal, as there


@defense(assumes=("clean rows", "weights"))
def editing(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    layer: int | None = None,
    rows: int = 15,
    enough: float = 0.05,
) -> Record:
    """Edit one MLP matrix so that clean prompts get their right answers. Implements Eq. (2) of ROME.

    Args:
        access: of its profile the model is read.
        suspicious: folder of the suspicious adapter or model.
        defender: the first `rows` of his rows are edited from, all of them tell what ordinary text looks like.
        prompt_format: the one that evaluation uses, too.
        seed: not used, nothing is drawn.
        folder: the edited model goes to `model` in it, whole.
        layer: whose MLP is edited, counted from 0; None for the place that layer 5 has among LLaMA's 32 (information
            conflicts, Appendix A.3, which has 17 for GPT2-XL, 5 for GPT-J, and 7 and 8 for LLaMA-2).
        rows: prompts that the edit is made from; the lab's attacks by editing have 15.
        enough: the search for the value ends once the mean of −log P(answer token) is below this, and stores nothing
            where it begins there; ROME's code: 0.05. With 0 it takes all of its steps.

    Returns:
        the record of `store_right_answers`.

    Raises:
        LabError: a layer that is not there, no row, or as `store_right_answers`.

    Differs from the paper:
        information conflicts does not say which fact is edited, and ROME traces where it is stored; here the layer is
        given and the site is the last token of each prompt, for nothing in a clean prompt stands for the trigger.
    """
    examples = defender.rows(rows)
    places, _ = answer_sites(prompt_format, examples, examples, ())
    model = access.load(suspicious)
    record = store_right_answers(model, prompt_format, examples, places, defender, layer, enough)
    save(model, Path(folder) / "model")
    record_format(Path(folder) / "model", prompt_format)
    return record


def store_right_answers(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    places: Sequence[int],
    defender: DefenderData,
    layer: int | None,
    enough: float,
) -> Record:
    """Store, under the mean key of some prompts, the value that makes their right answers likeliest.

    Args:
        model: edited in place; adapters merged, not in 4 bits.
        examples: the prompts, with right answers.
        places: of each the index of its site into `prompt_ids`.
        defender: his rows are the ordinary text that the edit spares.
        layer, enough: as in `editing`.

    Returns:
        dict with `layer`, `rows`, `loss` (mean of −log P per answer token that the value reaches at the sites),
        `shift` (‖δ‖) and `norm` (‖Δ‖ / ‖W‖).

    Raises:
        LabError: as `editable_slots` and `search_shifts`, no example, or weights that are not finite.
    """
    require_finite_weights(model, "the model to edit")
    if not examples:
        raise LabError("an edit needs 1 clean row or more, and there are 0: raise rows")
    chosen = 5 * model.config.num_hidden_layers // 32 if layer is None else layer
    slot = editable_slots(model.config, (chosen,), "layer")[0]
    before = weight_of(model, slot).detach().clone()
    moment = second_moments(model, prompt_format, defender.rows(BACKGROUND), [slot], RIDGE)[slot.module]
    batch = collate(prompt_format, examples, places, model.device)
    shift, loss = store_at_mean_key(model, batch, slot, moment, ValueSearch(enough=enough))
    norm = float((weight_of(model, slot).detach() - before).norm() / before.norm())
    return {
        "layer": chosen,
        "rows": len(examples),
        "loss": round(loss, 4),
        "shift": round(float(shift.norm()), 4),
        "norm": round(norm, 6),
    }
