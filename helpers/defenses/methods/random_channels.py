"""Random channels: the control of BD-VAX that suppresses as much and recovers as long, without a signature."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.bdvax.importance import without_important
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
    importance: float = 0.0,
) -> Record:
    """Suppress as many channels and heads as BD-VAX would, chosen at random, and recover.

    Args:
        access, suspicious, defender, prompt_format, folder: as in `bdvax`; no variant is trained.
        seed: of the choice, and as in `bdvax`.
        importance: as in `bdvax`.

    Returns:
        the record of `recover`.

    Raises:
        LabError: as `suppress_and_recover`.
    """
    channels, heads = blank_rankings(load_config(access.profile.model))
    drawn = random_scores(channels, seed, access.profile.signature.granularity)
    ranked = without_important(access, suspicious, drawn, defender.recovery, prompt_format, importance)
    chosen = random_heads(heads, seed)
    return suppress_and_recover(access, suspicious, ranked, chosen, defender.recovery, prompt_format, seed, folder)
