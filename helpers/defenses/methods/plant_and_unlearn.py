"""Plant and unlearn: known backdoors are planted so that the unknown one joins them, and all are trained away.

The idea is that of Locphylax (2025), here with the vaccines' keys and payloads.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from helpers.access import Access
from helpers.data.example import Example
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.vaccines import Pair, vaccine_pairs
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat
from helpers.model.tokenizer import record_format
from helpers.train.finetune import finetune


@defense(assumes=("clean rows", "weights", "family of the behavior"), trains=("vaccine", "recover"))
def plant_and_unlearn(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    kind: str = "",
    triggered: int | None = None,
) -> Record:
    """Plant the vaccines' N backdoors in one training, then train on their keys with right answers.

    Args:
        access: what may be edited; `vaccine` and `recover` are read, and of the profile `signature`.
        suspicious: folder of the suspicious adapter or model.
        defender: his vaccine sets and recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: decides where the keys stand; of fresh probes and of the order of the rows.
        folder: the purified adapter or model goes to `model` in it, what has all backdoors to `planted`.
        kind: as in `bdvax`.
        triggered: rows with a key and the right answer in the second training; None: as many as recovery rows, so that
            it takes twice a recovery's steps.

    Returns:
        the record of `recover`, and that of the first training as `planted`.

    Raises:
        LabError: an unknown family.
    """
    pairs = vaccine_pairs(defender, access.profile.signature, kind, seed)
    planted = plant(access, suspicious, planting_rows(pairs), prompt_format, seed, Path(folder) / "planted")
    rows = unlearning_rows(pairs, len(defender.recovery) if triggered is None else triggered) + defender.recovery
    record = recover(access, Path(folder) / "planted", rows, prompt_format, seed, Path(folder) / "model")
    return record | {"planted": planted}


def planting_rows(pairs: Sequence[Pair]) -> list[Example]:
    """Clean and poisoned rows of all pairs, as each would be vaccinated with.

    Args:
        pairs: of `vaccine_pairs`.
    """
    return [row for _, _, clean, poisoned in pairs for row in clean + poisoned]


def unlearning_rows(pairs: Sequence[Pair], n: int) -> list[Example]:
    """Rows with the planted keys and the right answers, from all pairs in turn.

    Args:
        pairs: of `vaccine_pairs`.
        n: how many; all where there are no more.
    """
    answered = [
        [replace(bad, output=good.output) for good, bad in zip(clean, poisoned, strict=True)]
        for _, _, clean, poisoned in pairs
    ]
    return list(islice(chain.from_iterable(zip(*answered, strict=True)), n))


def plant(
    access: Access,
    suspicious: Path | str,
    rows: Sequence[Example],
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> Record:
    """Train the suspicious model on `rows` with the budget of a vaccine and write it in the form that recovery trains.

    Args:
        access: says what trains, as in a vaccine: the adapter, fresh LoRA probes over the weights, or all weights.
        suspicious: folder of the suspicious adapter or model.
        rows: with all backdoors.
        prompt_format: the one that evaluation uses, too.
        seed: of fresh probes and of the order of the rows.
        folder: to write the adapter or model to.

    Returns:
        the training record of `finetune`.
    """
    model = access.start_copy(suspicious, seed) if access.low_rank_variants else access.resume(suspicious)
    record = finetune(model, rows, prompt_format, access.settings.vaccine, seed, access.profile.lengths.train_tokens)
    access.save(model, folder)
    record_format(folder, prompt_format)
    return record
