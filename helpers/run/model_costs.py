"""What a defense cost: all that was done between the suspicious model and the defended one."""

from collections.abc import Mapping
from typing import Any

# controls that need only the shapes of the scores: how many channels and heads there are
RANKED_OTHERWISE = {
    f"{cut}{ranking}" for cut in ("", "suppressed_") for ranking in ("random", "magnitude", "own_update")
}
RANKING = {"variants", "scores"}
REPORT = "evaluate/"


def spent_on(model: str, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds and memory of all stages that a model was made by, beyond those of the suspicious model.

    Measuring is left out, and with it what a defense spends while it answers. Where the challenge test chose τ, it
    counts for every model that was suppressed.

    Args:
        model: its report's stage without "evaluate/", such as "purified" or "arena/crow".
        manifests: of the stages of its run, by name.

    Returns:
        `seconds` in all and the largest `peak_mb`, that of the process and of whatever it did before; nothing where no
        defense made the model, where one stage makes and measures it, or where the run lacks a stage.
    """
    if (report := f"{REPORT}{model}") not in manifests:
        return {}
    needed = _line(report, manifests) - {report, "inject"}
    if model in RANKED_OTHERWISE:
        needed -= RANKING
    if not needed or not needed <= manifests.keys():
        return {}
    made = [manifests[stage] for stage in needed]
    return {
        "seconds": sum(manifest["seconds"] for manifest in made),
        "peak_mb": max(manifest["peak_rss_mb"] for manifest in made),
    }


def _line(stage: str, manifests: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """A stage and all that it was made from, as manifests tell, up to the suspicious model."""
    parents = () if stage == "inject" else manifests.get(stage, {}).get("parents", ())
    return {stage}.union(*(_line(parent, manifests) for parent in parents))
