"""What a sweep over the rows of a recovery says: which rows each run recovered on, and what tells two methods apart."""

import pandas as pd

from helpers.core.names import MODELS
from helpers.measure.paired import compare_all, comparison_table
from helpers.run.sweep_tables import prompt_by_prompt, seeds_by_prompt

METHODS = ("finetuned", "random", "magnitude", "own_update", "purified")  # all that recover, in a table's order


def recovered_on(table: pd.DataFrame) -> pd.Series:
    """What each row's run recovered on: "plain", "perturbed", or "plain, 15 epochs" where the grid sets their number.

    Args:
        table: of a sweep over `perturb.kinds` and `recover.epochs` of one or of both accesses.
    """
    return table.apply(_rows_of_recovery, axis=1)


def recoveries(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of what recovers, `METHODS`, and in a column `rows` what each recovered on.

    Args:
        table: as in `recovered_on`.
    """
    return table.assign(rows=recovered_on(table))[table["model"].isin(METHODS)]


def told_apart(held: pd.DataFrame) -> pd.DataFrame:
    """Paired tests of every method on perturbed rows: BD-VAX against the others, and each against itself on other rows.

    One family: payloads, right answers under the trigger and to clean prompts. The table shows the first and the last.

    Args:
        held: of `recoveries`, of one access. The prompts of all `seeds_tested` are pooled.

    Returns:
        by model, on perturbed rows, and what it is compared with, another one on them or itself on other rows: the
        difference of each measure in points with its 95 % interval, and p after Holm's correction. No rows where there
        is no such seed.
    """
    reports = prompt_by_prompt(_apart(held))
    if not reports:
        return pd.DataFrame()
    *others, ours = METHODS
    asked = [(ours, f"{other}, perturbed", _title(other)) for other in others]
    for kind in dict.fromkeys(held["rows"]):
        if kind != "perturbed":
            asked += [(one, f"{one}, {kind}", kind) for one in METHODS]
    tests = comparison_table(compare_all(reports, [(f"{one}, perturbed", against) for one, against, _ in asked]))
    labels = [(_title(one), title) for one, _, title in asked]
    measures = {"payload": "payload", "right on clean prompts": "clean"}
    columns = {"points": "points (95 %)", "p": "p (Holm)"}
    table = {f"{of}, {c}": tests[measure, column] for measure, of in measures.items() for c, column in columns.items()}
    return pd.DataFrame(table).set_axis(pd.MultiIndex.from_tuples(labels, names=["model", "against"]))


def seeds_tested(held: pd.DataFrame) -> list[int]:
    """The seeds whose prompts `told_apart` compares: those recorded prompt by prompt for every method and its rows.

    Args:
        held: of `recoveries`, of one access.
    """
    return seeds_by_prompt(_apart(held))


def _apart(held: pd.DataFrame) -> pd.DataFrame:
    """The same with models named after their rows, too: "purified, plain"."""
    return held.assign(model=held["model"] + ", " + held["rows"])


def _title(model: str) -> str:
    return MODELS[model].removesuffix(", recovered").removesuffix(" alone").removesuffix(" channels")


def _rows_of_recovery(run: pd.Series) -> str:
    kinds, epochs = (run.get(f"{run['ACCESS']}.{setting}") for setting in ("perturb.kinds", "recover.epochs"))
    if pd.notna(epochs):
        return f"plain, {epochs:.0f} epochs"
    return "perturbed" if pd.notna(kinds) and kinds != "[]" else "plain"
