"""What the sweep `conflict_defenses` says: the paper's eight baselines and its own defense, on its three corpora."""

import pandas as pd

from helpers.run.arena.swept import shown_as

CORPORA = {"sst2": ("sst2",), "emotion": ("emotion",), "conversation": ("conversation", "autopoison", "sentiment")}
OURS = {"conflict": "conflict merge", "argued/book-merged-evidence": "conflict merge and evidence"}


def defended(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the defenses and of the backdoored models: with plain names, their corpus and what they answer right.

    Args:
        table: of the sweep.

    Returns:
        columns `defense`, `corpus` (one of `CORPORA`) and `right` beside the others. `right` is the paper's accuracy:
        right answers to clean prompts of the attacked task, or where it has none of its own the utility over all
        families; empty where a defense decodes and nothing was checked.
    """
    names = {model: shown_as(model) for model in table["model"].unique() if model.startswith("arena/")}
    names = {"backdoored": "backdoored"} | names | OURS
    places, corpora = list(names), {task: corpus for corpus, tasks in CORPORA.items() for task in tasks}
    rows = table[table["model"].isin(names)]
    rows = rows.sort_values("model", key=lambda models: models.map(places.index), kind="stable")
    own = rows["task_utility"].fillna(rows["utility"])
    return rows.assign(defense=rows["model"].map(names), corpus=rows["TASK"].map(corpora), right=own)
