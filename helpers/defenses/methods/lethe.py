"""LETHE (USENIX Security 2026): a wide clean adapter merged half and half, and dictionary glosses in every prompt."""

from dataclasses import replace
from pathlib import Path

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.roles import DefenderData
from helpers.defenses.conflict.merge.checks import check_share
from helpers.defenses.conflict.wordnet import find_wordnet
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
        folder: as in `conflict`; `decoding.json` lies beside `model` where a WordNet is installed.
        r, alpha: rank of the clean model's adapter, and its LoRA α. LETHE's code: 64 and 16.
        t: the clean model's share in the linear merge. LETHE's code: 0.5.
        words: how many words of a prompt are explained; 5 in LETHE.
        max_words: the most words of evidence in a prompt; LETHE has no limit.

    Returns:
        the record of `conflict`, and `evidence`: one line on what the prompts carry.

    Raises:
        LabError: a number out of range, or as `conflict`.

    Differs from the paper:
        the clean model trains by the budget of the conflict model, not for 4 epochs at 2e-4, and on the base in its
        own precision, not in 4 bits; for the glosses see `with_glosses`.
    """
    check_share(t)
    if min(r, alpha, words, max_words) < 1:
        raise LabError(f"r, alpha, words and max_words = {r}, {alpha}, {words}, {max_words} should be 1 or more each")
    profile = access.profile
    lora = profile.lora.model_copy(update={"r": r, "alpha": alpha})
    merging = profile.conflict.model_copy(update={"start": "base", "method": "linear", "t": t})
    wide = replace(access, profile=profile.model_copy(update={"lora": lora, "conflict": merging}))
    record = conflict(wide, suspicious, defender, prompt_format, seed, folder)
    return record | {"evidence": _explain(folder, words, max_words)}


def _explain(folder: Path | str, words: int, max_words: int) -> str:
    """Let prompts carry evidence where there is a WordNet, and say so."""
    wordnet = find_wordnet()
    if wordnet is None:
        return "none: no WordNet is installed (Debian: wordnet-base), so the merge stands alone"
    write_decoding(folder, "lethe", words=words, max_words=max_words)
    return f"glosses of {words} words in each prompt, from {wordnet.folder}"
