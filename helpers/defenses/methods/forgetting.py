"""Forgetting a trigger: what immune twins learned, added to the suspicious model or used as a ranking."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.bdvax.forgetting import TWINS, add_forgetting, plan_immune, require_adapters
from helpers.defenses.bdvax.recover import recover
from helpers.defenses.bdvax.score import load_rankings, score_variants
from helpers.defenses.bdvax.vaccines import train_variants, variant_folders
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights"), trains=("vaccine", "recover"))
def forgetting(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    weight: float = 1.0,
    suppress: bool = False,
) -> Record:
    """Train immune twins, add what they learned beyond the clean ones, and recover.

    Args:
        access: what may be edited; `vaccine`, `suppress` and `recover` are read, and of the profile `signature`.
        suspicious, defender, prompt_format, seed: as in `bdvax`; no payload is planted, so no family is assumed.
        folder: the purified adapter or model goes to `model` in it, beside `variants` and what is made on the way.
        weight: how far the suspicious model is moved along the mean difference; 0 leaves it where it is.
        suppress: whether the channels and heads that forgetting changes most, ranked as a signature is, are suppressed
            before the recovery.

    Returns:
        the record of `recover`.

    Raises:
        LabError: as `add_forgetting`, `train_variants` and `suppress_and_recover`.
    """
    place, signature = Path(folder), access.profile.signature
    variants, start = place / "variants", suspicious
    twins = variant_folders(variants, signature.n, TWINS)
    if weight:
        require_adapters(access)
    train_variants(access, suspicious, plan_immune(defender, signature, seed, variants), prompt_format)
    if weight:
        start = place / "moved"
        add_forgetting(access, suspicious, *twins, weight, start)
    if not suppress:
        return recover(access, start, defender.recovery, prompt_format, seed, place / "model")
    score_variants(access, *twins, place / "scores")
    rankings = load_rankings(place / "scores")
    return suppress_and_recover(access, start, *rankings, defender.recovery, prompt_format, seed, place)
