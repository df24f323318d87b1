"""What a purification did, what it cost, and what it does not prove: one dict for machines, one page for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from helpers.core.store import Run
from helpers.data.own_backdoors import challenge_behavior
from helpers.plots import picture
from helpers.plots.purify import suppressed_by_layer
from helpers.purify.case import Case
from helpers.run.rates import percent

LIMITS = (
    "No step of this report detects a backdoor. Where no trigger was brought, nobody can tell from it whether the "
    "model had one.",
    "A challenge is a backdoor of the defender's own, planted last and by few rows. The share that removes it is a "
    "least share: another kind of backdoor may need more.",
    "Utility and perplexity were measured on held-out rows of the kind that was brought. Abilities that these rows do "
    "not ask for were not measured.",
)


def build(
    case: Case,
    method: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    suppressed: Mapping[str, Any] | None,
    challenges: Mapping[str, Any] | None,
    assumes: Sequence[str],
) -> dict[str, Any]:
    """All that is known of a purification, JSON-able.

    Args:
        before, after: what `steps.measure` returned for the suspicious and the purified model.
        suppressed: what went, see `steps.suppress`; None where nothing was suppressed.
        challenges: `verdict`, `points`, `copies` and `refused`; None where none was planted.
        assumes: what the method needs.
    """
    stages = list(case.run.stages())
    return {
        "suspect": {
            "folder": case.suspect.folder.name,
            "kind": case.suspect.access,
            "base": Path(case.suspect.base).name,
        },
        "profile": case.profile.name,
        "method": method,
        "seed": case.seed,
        "notes": list(case.dealt.notes),
        "rows": {
            "held_out": len(case.dealt.held_out),
            "recovery": len(case.dealt.defender.recovery),
            "vaccines": [len(rows) for rows in case.dealt.defender.vaccine_sets],
        },
        "before": dict(before),
        "after": dict(after),
        "suppressed": suppressed,
        "challenges": challenges,
        "assumes": list(assumes),
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
            f"With the trigger that was brought, the attack success rate fell from "
            f"{percent(before['known_trigger']['asr'])} to {percent(known['asr'])} % (95 % interval {percent(low)} to "
            f"{percent(high)}, n = {known['n']}). It decided nothing here."
        )
    else:
        said.append("No trigger was brought: nobody can tell from this report whether there was a backdoor.")
    if challenges := report["challenges"]:
        worst = challenges["verdict"]
        low, high = worst["interval"]
        state = "is gone" if worst["asr"] <= threshold else "is NOT gone: do not trust this cure"
        said.append(
            f"The hardest of {len(challenges['copies'])} challenges ({worst['kind']}) {state} with "
            f"{percent(worst['tau'])} % of the channels suppressed: {percent(worst['asr'])} % are left (95 % interval "
            f"{percent(low)} to {percent(high)}, n = {worst['n']})."
        )
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


def write_page(report: Mapping[str, Any], threshold: float, run: Run) -> None:
    """Write `report.html`, which needs no other file."""
    figures = []
    if report["suppressed"]:
        shares = by_layer(report["suppressed"]["channels"])
        alt = "Bars: the share of MLP channels suppressed in each layer, " + ", ".join(
            f"layer {layer} {share:.0f} %" for layer, share in shares.items()
        )
        caption = "Where it was suppressed: the share of each layer's MLP channels."
        figures.append(picture.image(suppressed_by_layer(shares), run.figures / "suppressed.png", alt, caption))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    page = environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict(report, threshold),
        figures=[figure._repr_html_() for figure in figures],
        sentence=challenge_behavior().payload,
    )
    (run.folder / "report.html").write_text(page, encoding="utf-8")
