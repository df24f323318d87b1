"""Fine-Pruning (Liu et al. 2018) as BD-VAX compares with it: what is dormant on clean rows goes, then recovery."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.methods.random_channels import random_channels
from helpers.defenses.pruning.activations import clean_batches
from helpers.defenses.pruning.wanda import dormant_rankings
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def fine_pruning(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> Record:
    """Suppress the neurons that matter least on clean rows, and recover. Implements Fine-Pruning of BD-VAX, §5.1.

    As many go as in a signature. With full access the summed Wanda score of a neuron, or head, ranks it; with adapter
    access the paper lets nobody see activations and draws at random, so that it is `random_channels`, bit by bit.

    Args:
        access: what may be edited; its `suppress` and `recover` numbers are used.
        suspicious: folder of the suspicious adapter or model.
        defender: his recovery rows rank and recover.
        prompt_format: the one that evaluation uses, too.
        seed: of the choice at random, of what takes the place of weights, and of the order of the rows.
        folder: the purified adapter or model goes to `model` in it, beside `cut`.

    Returns:
        the record of `recover`.

    Raises:
        LabError: as `suppress_and_recover` and `clean_batches`.

    Differs from the paper:
        it does not say how Wanda's scores of single weights become one of a neuron; they are summed here. What goes is
        drawn anew, as in BD-VAX, where Fine-Pruning zeroes.
    """
    if not access.edits_weights:
        return random_channels(access, suspicious, defender, prompt_format, seed, folder)
    model, rows = access.load(suspicious), defender.recovery
    rankings = dormant_rankings(model, clean_batches(model, rows, prompt_format, access.profile))
    del model  # the training loads its own
    return suppress_and_recover(access, suspicious, *rankings, rows, prompt_format, seed, folder)
