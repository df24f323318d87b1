"""The sweeps behind information conflicts: clean rows, merges, evidence, and attackers who know the defenses."""

import pandas as pd

from helpers.core.names import ATTACKERS, MERGES, SETTINGS
from helpers.run.rates import number
from helpers.run.results_page.markdown import Section
from helpers.run.results_page.sweeps import named, recorded, source
from helpers.run.sweep_tables import means, of_model, over_seeds, parts_of

ATTACK = ["attack", "task"]
EXTERNAL, BOTH = "argued/book-backdoored-evidence", "argued/book-merged-evidence"


def sections() -> list[Section]:
    """One table for each sweep; two of the evidence, which has a price."""
    return [_share(), _merges(), _evidence(), _evidence_price(), _mixtures(), _adaptive(), _adaptive_cba()]


def _share() -> Section:
    table, keys = recorded("share"), ["conflict.budget.rows"]
    columns = {
        "ASR, %": over_seeds(of_model(table, "conflict"), keys),
        "right, %": over_seeds(of_model(table, "conflict"), keys, "right_under_trigger"),
        "utility, %": over_seeds(of_model(table, "conflict"), keys, "utility"),
    }
    return Section(
        "Clean rows for the conflict model",
        "What the linear merge leaves, when the conflict model was trained on so many clean rows.",
        source("share"),
        named(pd.DataFrame(columns), {"conflict.budget.rows": "clean rows"}),
    )


def _merges() -> Section:
    table = recorded("merges")
    numbers = [column for column in table if column in SETTINGS]
    used = ((f"{SETTINGS[c]} {number(row[c])}" for c in numbers if pd.notna(row[c])) for _, row in table.iterrows())
    table["merge"], table["number"] = table["conflict.method"].map(MERGES), [next(found, "") for found in used]
    keys = ["merge", "number"]
    columns = {
        "ASR, %": means(table, "conflict", keys),
        "right, %": means(table, "conflict", keys, "right_under_trigger"),
        "utility, %": means(table, "conflict", keys, "utility"),
    }
    return Section(
        "Every merge, over its number",
        "What each merge leaves of the paper's own example (CBA, emotion): over the conflict model's share, the share "
        "of the changes that TIES keeps, and the step past the conflict model.",
        source("merges"),
        pd.DataFrame(columns),
    )


def _evidence() -> Section:
    table = recorded("evidence")
    columns = {
        "planted": means(table, "backdoored", ATTACK),
        "a part": means(table, "backdoored", ATTACK, "near_part"),
        "no key": means(table, "backdoored", ATTACK, "near_absent"),
        "internal": means(table, "conflict", ATTACK),
        "external": means(table, EXTERNAL, ATTACK),
        "both": means(table, BOTH, ATTACK),
    }
    return Section(
        "Every attack of the information conflicts paper",
        "ASR in percent: planted, with a part of the key and without it; after the merge (internal), with evidence in "
        "the prompt (external), and with both.",
        source("evidence"),
        pd.DataFrame(columns),
    )


def _evidence_price() -> Section:
    table, models = recorded("evidence"), {"backdoored": "backdoored", "internal": "conflict"}
    models |= {"external": EXTERNAL, "both": BOTH}
    columns = {name: means(table, model, ATTACK, "utility") for name, model in models.items()}
    return Section(
        "What evidence costs",
        "Utility in percent of the same models. The small model never learned to read a passage.",
        source("evidence"),
        pd.DataFrame(columns),
    )


def _mixtures() -> Section:
    table, keys = parts_of(recorded("mixtures"), "mixtures"), [*ATTACK, "model"]
    measures = {"ASR, %": "asr", "utility, %": "utility", "on its task, %": "task_utility"}
    columns = {name: over_seeds(table, keys, measure) for name, measure in measures.items()}
    return Section(
        "Models before and after merging",
        "M3 knows clean rows alone, M4 poisoned ones; M5 all poisoned rows and a tenth as many clean ones, M6 a tenth "
        "of the poisoned ones alone. CBA is that of the paper's Table 6, whose accuracy is that of the attacked task, "
        "the last column.",
        source("mixtures"),
        pd.DataFrame(columns),
    )


def _adaptive_cba() -> Section:
    table = recorded("adaptive_cba")
    table["attacker"] = table["attack.by"].map(ATTACKERS)
    columns = {
        f"{name}: {heading}": over_seeds(of_model(table, model), ["attacker"], measure)
        for name, model in {"planted": "backdoored", "merge": "conflict"}.items()
        for heading, measure in {"ASR, %": "asr", "utility, %": "utility"}.items()
    }
    return Section(
        "Subtracting a conflict model from CBA",
        "The attack of the paper's Table 7 (emotion), where the merge leaves 8.6 to 15.3 % of the attacker who "
        "subtracts.",
        source("adaptive_cba"),
        pd.DataFrame(columns),
    )


def _adaptive() -> Section:
    table = recorded("adaptive").rename(columns={"ACCESS": "access"})
    table["attacker"] = table["attack.by"].map(ATTACKERS)
    keys, models = ["attacker", "access"], {"none": "backdoored", "BD-VAX": "purified", "merge": "conflict"}
    measures = {"ASR, %": "asr", "right, %": "right_under_trigger", "utility, %": "utility"}
    parts = {
        defense: pd.DataFrame(
            {name: over_seeds(of_model(table, model), keys, measure) for name, measure in measures.items()}
        )
        for defense, model in models.items()
    }
    return Section(
        "Attackers who know the defenses",
        "What is planted by an attacker who prepares for a defense (subtracts a conflict model, evades the signature), "
        "and what either defense leaves of it.",
        source("adaptive"),
        pd.concat(parts, names=["defense"]).reorder_levels([*keys, "defense"]),
    )
