"""BD-VAX (Li and Kim 2026): vaccinate, score, select, suppress, recover."""

from pathlib import Path

from helpers.access import Access
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.cure import suppress_and_recover
from helpers.defenses.bdvax.importance import without_important
from helpers.defenses.bdvax.score import load_rankings, score_variants
from helpers.defenses.bdvax.vaccines import plan_variants, train_variants, vaccine_pairs, variant_folders
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights", "family of the behavior"), trains=("vaccine", "recover"))
def bdvax(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    kind: str = "",
    importance: float = 0.0,
) -> Record:
    """Suppress the signature of backdoors and recover. Implements Algorithm 1, BD-VAX §4.

    Args:
        access: what may be edited; `vaccine`, `suppress` and `recover` are read, and of the profile `signature`.
        suspicious: folder of the suspicious adapter or model.
        defender: his vaccine sets and recovery rows are used.
        prompt_format: the one that evaluation uses, too.
        seed: of the run.
        folder: the purified adapter or model goes to `model` in it, beside `variants`, `scores` and `cut`.
        kind: the family of vaccines of the attack's kind, which is assumed where `signature.family` is "task" and not
            read otherwise.
        importance: how much a channel's rank among those that clean rows use most is taken off its rank in the
            signature; see `without_important`. The paper takes off nothing.

    Returns:
        the record of `recover`.

    Raises:
        LabError: an unknown family, or as `train_variants` and `suppress_and_recover`.
    """
    variants, scores = Path(folder) / "variants", Path(folder) / "scores"
    pairs = vaccine_pairs(defender, access.profile.signature, kind, seed)
    train_variants(access, suspicious, plan_variants(pairs, seed, variants), prompt_format)
    score_variants(access, *variant_folders(variants, len(pairs)), scores)
    channels, heads = load_rankings(scores)
    ranked = without_important(access, suspicious, channels, defender.recovery, prompt_format, importance)
    return suppress_and_recover(access, suspicious, ranked, heads, defender.recovery, prompt_format, seed, folder)
