"""What a defense cost: everything between the suspicious model and the defense's own."""

from collections.abc import Mapping
from typing import Any

from helpers.core.stages import entry, line_of

RANKED_OTHERWISE = {"random", "magnitude", "own_update"}  # controls: of the scores they take the shape alone
RANKING = {"variants", "scores"}


def spent_on(model: str, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds and memory of all stages that a model was made by, beyond those of the suspicious model.

    Measuring is left out, and with it what a defense spends while it answers.

    Args:
        model: its report's stage without "evaluate/", such as "purified" or "arena/crow".
        manifests: of the stages of its run, by name.

    Returns:
        `seconds` in all and the largest `peak_mb`; nothing for a model that no defense made, whose stage both makes and
        measures it, or of whose stages the run lacks one.
    """
    report = entry(f"evaluate/{model}")
    needed = set().union(*map(line_of, report.parents)) - {"inject"} if report else set()
    if model in RANKED_OTHERWISE:
        needed -= RANKING
    if not needed or not needed <= manifests.keys():
        return {}
    made = [manifests[stage] for stage in needed]
    return {
        "seconds": sum(manifest["seconds"] for manifest in made),
        "peak_mb": max(manifest["peak_rss_mb"] for manifest in made),
    }
