"""Random channels: the control of BD-VAX that cuts as much and heals as long, without a signature."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import cut_and_heal
from helpers.defenses.bdvax.score import blank_rankings, random_heads, random_scores
from helpers.defenses.registry import Record, defense
from helpers.model.checkpoint import load_config
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("recover",))
def random_channels(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
) -> Record:
    """Cut as many channels and heads as BD-VAX would, chosen at random, and heal.

    Args:
        access, suspicious, defender, prompt_format, folder: as in `bdvax`; no variant is trained.
        seed: of the choice, and as in `bdvax`.

    Returns:
        the record of `recover`.

    Raises:
        LabError: as `cut_and_heal`.
    """
    channels, heads = blank_rankings(load_config(access.profile.model))
    drawn = random_scores(channels, seed, access.profile.signature.granularity), random_heads(heads, seed)
    return cut_and_heal(access, suspicious, *drawn, defender.recovery, prompt_format, seed, folder)
