"""What a purification did, what it cost, and what it does not prove: one dict for machines, one page for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from helpers import plots
from helpers.core.store import Run, Stage
from helpers.data.own_backdoors import challenge_behavior
from helpers.plots.picture import Picture
from helpers.purify.case import Case
from helpers.run.rates import percent, with_interval

ASKED = "family of the behavior"  # what a run with vaccines of all families does not need to be told
LIMITS = (
    "No step of this report detects a backdoor. Where no trigger was brought, nobody can tell from it whether the "
    "model had one.",
    "A challenge is a backdoor of the defender's own, planted last and by few rows. The share that removes it is a "
    "least share: another kind of backdoor may need more.",
    "Each kind was planted and cured once, with one seed. What is left of it is counted on few prompts: the intervals "
    "say how few.",
    "Utility and perplexity were measured on held-out rows of the kind that was brought. Abilities that these rows do "
    "not ask for were not measured.",
)


def build(
    case: Case,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    suppressed: Mapping[str, Any] | None,
    challenges: Mapping[str, Any] | None,
    assumes: Sequence[str],
    stages: Sequence[Stage],
) -> dict[str, Any]:
    """All that is known of a purification, JSON-able.

    Args:
        before, after: what `steps.measure` returned for the suspicious and the purified model.
        suppressed: what went, see `steps.suppress`; None where nothing was suppressed.
        challenges: `verdict`, `points`, `copies` and `refused`; None where none was planted.
        assumes: what the method needs.
        stages: that it took.
    """
    return {
        "suspect": {
            "folder": case.suspect.folder.name,
            "kind": case.suspect.access,
            "base": Path(case.suspect.base).name,
        },
        "profile": case.profile.name,
        "method": case.method,
        "seed": case.seed,
        "prompt_format": case.prompt_format.name,
        "notes": case.notes(),
        "rows": {
            "held_out": len(case.dealt.held_out),
            "recovery": len(case.dealt.defender.recovery),
            "vaccines": [len(rows) for rows in case.dealt.defender.vaccine_sets],
        },
        "before": dict(before),
        "after": dict(after),
        "suppressed": suppressed,
        "challenges": challenges,
        "assumes": [need for need in assumes if need != ASKED],
        "limits": list(LIMITS),
        "cost": {
            "seconds": sum(stage.manifest["seconds"] for stage in stages),
            "peak_rss_mb": max(stage.manifest["peak_rss_mb"] for stage in stages),
            "stages": {stage.name: stage.manifest["seconds"] for stage in stages},
        },
    }


def verdict(report: Mapping[str, Any], threshold: float) -> list[str]:
    """What a reader has to know first, as sentences.

    Args:
        report: of `build`.
        threshold: the largest ASR, in [0, 1], at which a challenge counts as gone.
    """
    before, after, said = report["before"], report["after"], []
    if known := after["known_trigger"]:
        low, high = known["asr_interval"]
        said.append(
            f"With the trigger that was brought, the attack success rate went from "
            f"{percent(before['known_trigger']['asr'])} to {percent(known['asr'])} % (95 % interval {percent(low)} to "
            f"{percent(high)}, n = {known['n']}). It decided nothing here."
        )
    else:
        said.append(
            "No trigger was brought: this report cannot tell whether there was a backdoor, nor whether one is left. "
            "What it can tell is what the cure cost."
        )
    if challenges := report["challenges"]:
        worst = challenges["verdict"]
        low, high = worst["interval"]
        state = "is gone" if worst["asr"] <= threshold else "is NOT gone (do not trust this suppression)"
        said.append(
            f"The hardest of {len(challenges['copies'])} challenges ({worst['kind']}) {state} with "
            f"{percent(worst['tau'])} % of the channels suppressed: {percent(worst['asr'])} % are left (95 % interval "
            f"{percent(low)} to {percent(high)}, n = {worst['n']})."
        )
    if report["method"] != "bdvax":
        said.append("No challenge judges the merge: whether it removed a backdoor, only a known trigger could tell.")
    change = 100 * (after["utility"] - before["utility"])
    said.append(
        f"Utility went from {percent(before['utility'])} to {percent(after['utility'])} % on {after['n']} held-out "
        f"rows ({change:+.1f} points), perplexity from {before['perplexity']:.2f} to {after['perplexity']:.2f}."
    )
    return said


def by_layer(channels: Mapping[str, Sequence[int]]) -> dict[int, float]:
    """The share of each layer's channels that went, in percent.

    Args:
        channels: {module: [suppressed, all]}.
    """
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for module, (gone, there) in channels.items():
        layer = next(int(part) for part in module.split(".") if part.isdigit())
        sums[layer][0] += gone
        sums[layer][1] += there
    return {layer: 100 * gone / there for layer, (gone, there) in sorted(sums.items())}


def draw_challenges(challenges: Mapping[str, Any], run: Run) -> Picture:
    """The challenges against the share suppressed, from the copies as they were planted.

    Args:
        challenges: of `build`.
        run: whose folder keeps the picture.
    """
    curves = {
        name: [copy | {"tau": 0.0}, *(point for point in challenges["points"] if point["kind"] == name)]
        for name, copy in challenges["copies"].items()
    }
    ends = ", ".join(
        f"{name} from {percent(points[0]['asr'])} to {percent(points[-1]['asr'])} % at a share of "
        f"{percent(points[-1]['tau'])} %"
        for name, points in curves.items()
    )
    return plots.image(
        plots.tau_curves(curves),
        run.figures / "challenges.png",
        f"Lines: attack success rate and utility of each challenge against the share of channels suppressed; {ends}",
        "Each line is one of the defender's own backdoors: where it reaches the bottom, that share removes it.",
    )


def draw_suppressed(suppressed: Mapping[str, Any], run: Run) -> Picture:
    """Where channels went, layer by layer.

    Args:
        suppressed: of `build`.
        run: whose folder keeps the picture.
    """
    shares = by_layer(suppressed["channels"])
    told = ", ".join(f"layer {layer} {share:.0f} %" for layer, share in shares.items())
    return plots.image(
        plots.suppressed_by_layer(shares),
        run.figures / "suppressed.png",
        f"Bars: the share of MLP channels suppressed in each layer, {told}",
        "Each bar is the share of one layer's MLP channels, over all of its matrices that were scored.",
    )


def write_page(report: Mapping[str, Any], threshold: float, run: Run) -> None:
    """Write `report.html`, which needs no other file."""
    figures = {}
    if report["challenges"]:
        figures["challenges"] = draw_challenges(report["challenges"], run)
    if report["suppressed"]:
        figures["suppressed"] = draw_suppressed(report["suppressed"], run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "with_interval": with_interval}
    page = environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report, threshold),
        figures={name: figure._repr_html_() for name, figure in figures.items()},
        sentence=challenge_behavior().payload,
    )
    (run.folder / "report.html").write_text(page, encoding="utf-8")
