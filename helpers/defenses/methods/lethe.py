"""LETHE (USENIX Security 2026): a wide clean adapter merged half and half, and dictionary glosses in every prompt."""

from dataclasses import replace
from pathlib import Path

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.merge.checks import check_share
from helpers.defenses.conflict.wordnet import require_wordnet
from helpers.defenses.decoding import write_decoding
from helpers.defenses.methods.conflict import conflict
from helpers.defenses.registry import Record, defense
from helpers.model.prompt import PromptFormat


@defense(assumes=("clean rows", "weights", "clean base", "decoding"), trains=("conflict",))
def lethe(
    access: Access,
    suspicious: Path | str,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    folder: Path | str,
    r: int = 64,
    alpha: int = 16,
    t: float = 0.5,
    words: int = 5,
    max_words: int = 100,
) -> Record:
    """Merge with a clean model of a wider adapter, and let WordNet explain the words of each prompt.

    Args:
        access: of its profile `conflict.budget` is used; the model's path is the clean base.
        suspicious, defender, prompt_format, seed: as in `conflict`.
        folder: as in `conflict`; `decoding.json` lies beside `model` where words are explained.
        r, alpha: rank of the clean model's adapter, and its LoRA α. LETHE's code: 64 and 16.
        t: the clean model's share in the linear merge. LETHE's code: 0.5.
        words: how many words of a prompt are explained; 5 in LETHE, 0 for the merge alone.
        max_words: the most words of evidence in a prompt; LETHE has no limit.

    Returns:
        the record of `conflict`.

    Raises:
        LabError: a number out of range, words to explain and no WordNet, or as `conflict`.

    Differs from the paper:
        the clean model trains by the budget of the conflict model, not for 4 epochs at 2e-4, and on the base in its
        own precision, not in 4 bits; for the glosses see `with_glosses`.
    """
    check_share(t)
    if min(r, alpha, max_words) < 1 or words < 0:
        raise LabError(
            f"r, alpha and max_words = {r}, {alpha}, {max_words} should be 1 or more each, words = {words} 0 or more"
        )
    if words:
        require_wordnet()
    profile = access.profile
    lora = profile.lora.model_copy(update={"r": r, "alpha": alpha})
    merging = profile.conflict.model_copy(update={"start": "base", "method": "linear", "t": t})
    wide = replace(access, profile=profile.model_copy(update={"lora": lora, "conflict": merging}))
    record = conflict(wide, suspicious, defender, prompt_format, seed, folder)
    if words:
        write_decoding(folder, "lethe", words=words, max_words=max_words)
    return record
