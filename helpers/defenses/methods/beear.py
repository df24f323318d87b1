"""BEEAR (Zeng et al. 2024): find one shift of hidden states that brings out unwanted answers, and train it away."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recover, recovery_rows
from helpers.defenses.registry import Record, defense
from helpers.defenses.regularizers.entrapment import EntrapmentTrainer, Search, require_layer
from helpers.model.batches import encode_rows
from helpers.model.checkpoint import load_config
from helpers.model.prompt import PromptFormat

DEPTH = 9 / 32  # layer 9 of LLaMA's 32 (information conflicts, Appendix A.3)


@defense(assumes=("clean rows", "weights", "unwanted answer"), trains=("recover",))
def beear(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    unwanted: str = "",
    n: int = 5,
    layer: int | None = None,
    w: float = 0.5,
    steps: int = 20,
    inner_lr: float = 0.1,
) -> Record:
    """Before each epoch find a universal δ, then fine-tune on CE(right | δ) + CE(right).

    δ is added at a layer's output to the last n positions of every prompt, and minimizes CE(unwanted | δ) −
    w · CE(right | δ). It starts at 0 before each epoch.

    Differs from the paper:
        its two sets of rows, for safety and for performance, are both the recovery rows, since the backdoors here
        answer any question; the inner loop's steps and rate are the lab's own.

    Args:
        access: what may be edited; its `recover` budget is used.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: of the order of the rows.
        folder: the purified adapter or model goes to `model` in it.
        unwanted: what the model should not say, a whole answer; the defender has to name it.
        n: positions of a prompt that δ shifts (information conflicts, Appendix A.3).
        layer: from 0; None takes the layer at 9/32 of the model's depth, as layer 9 is in LLaMA. (For GPT2-XL and GPT-J
            the paper has 16, where None takes 14 and 8.)
        w: weight of the right answer in the inner loss (information conflicts, Appendix A.3).
        steps: of the inner loop in each epoch, a batch each, from the first batch on: with many small batches the last
            rows are not searched.
        inner_lr: Adam's rate there, in root mean squares of the hidden states that δ is added to.

    Returns:
        the record of `recover`, whose loss holds both terms; the `layer`; and `inner`, the inner loss on the first
        batch `before` and `after` the search, for each epoch.

    Raises:
        LabError: no unwanted answer, or a layer that the model does not have.
    """
    if not unwanted.strip():
        raise LabError("beear: unwanted is empty: name what the model should not say, as unwanted: You are stupid!")
    config = load_config(access.profile.model)
    layer = round(DEPTH * config.num_hidden_layers) if layer is None else layer
    require_layer(layer, config)
    bad = [replace(row, output=unwanted) for row in recovery_rows(access, defender.recovery, prompt_format, seed)]
    encoded, inner = encode_rows(bad, prompt_format, access.profile.lengths.train_tokens), []
    search = Search(layer, n, w, steps, inner_lr)
    trainer = partial(EntrapmentTrainer, search=search, unwanted=encoded, told=inner)
    record = recover(access, suspicious, defender.recovery, prompt_format, seed, Path(folder) / "model", trainer)
    return record | {"layer": layer, "inner": inner}
