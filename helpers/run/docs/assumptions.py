"""What each defense assumes and trains, as a table."""

import pandas as pd

from helpers.core.choices import DEFENSES
from helpers.defenses.registry import find_defense, joined
from helpers.run.rates import GAP
from helpers.run.results_page.markdown import table_of


def assumptions() -> str:
    """A line for each registered defense: what it needs beyond the suspicious model, and which budgets it spends.

    Raises:
        LabError: as `find_defense`.
    """
    defenses = {name: find_defense(name) for name in sorted(DEFENSES.modules(), key=_demands)}
    assumed = joined(*defenses.values())["assumes"]
    lines = {
        f"`{name}`": {what: "needed" if what in found.traits.assumes else GAP for what in assumed}
        | {"budgets it spends": ", ".join(dict.fromkeys(found.traits.trains))}
        for name, found in defenses.items()
    }
    return table_of(pd.DataFrame.from_dict(lines, orient="index").rename_axis("defense"))


def _demands(name: str) -> tuple[int, str]:
    """The modest first."""
    return len(find_defense(name).traits.assumes), name
