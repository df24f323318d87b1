"""What a run has measured, gathered into one summary and shown as one table."""

from collections.abc import Mapping
from typing import Any

from helpers.core import stages
from helpers.core.arena import title_of
from helpers.core.cost import versions
from helpers.core.errors import LabError
from helpers.core.store import Run, Stage
from helpers.measure.asr import LABELS
from helpers.run.arena.outcomes import Outcome, stored
from helpers.run.rates import percent

MEASURES = (
    *("asr", "asr_interval", "labels", "n", "field_degenerate", "right_under_trigger"),
    *("false_trigger", "false_trigger_interval", "false_trigger_n"),
    *("utility", "utility_by_family", "utility_metric", "clean_accuracy", "perplexity", "prompt_format_mismatch"),
)
NEWER = ("keyword_asr", "clean_labels")  # measures that stages and summaries of an earlier lab do not have
COMPARE = stages.COMPARE[:2]  # the notebook that holds the arena


def summarise(run: Run, method: str = stages.DEFAULT) -> dict[str, Any]:
    """Gather what the notebooks measured: settings, one entry for each row of the table, the cost of each stage.

    Rates are fractions in [0, 1], as is `tau`, the share of channels suppressed (None where nothing was); `seconds` and
    `peak_rss_mb` map stage names to numbers. `arena` holds the rows of the arena by name, those that the run has made;
    a defense that does not apply has its reason there under `does_not_apply`.

    Raises:
        LabError: a row is missing or stale, or rows were measured with different prompts or decoding.
    """
    rows = {model: run.need(f"evaluate/{model}") for model in stages.method(method).models}
    made = list(run.stages())
    config = run.config
    return {
        "profile": config["profile"]["name"],
        "method": method,
        **{key: config[key] for key in ("attack", "task", "access", "seed")},
        "data": config["data"]["path"],
        "rows": config["rows"]["path"],
        "tau": run.need("suppressed").result["tau"] if "suppressed" in rows else None,
        "prompt_format": _agreed("prompt_format", rows),
        "decoding": _agreed("decoding", rows),
        "versions": versions(),
        **{row: _measures(stage.result) for row, stage in rows.items()},
        "arena": _arena(run, method),
        "seconds": {stage.name: stage.manifest["seconds"] for stage in made},
        "peak_rss_mb": {stage.name: stage.manifest["peak_rss_mb"] for stage in made},
    }


def _measures(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary keeps of a model's report."""
    kept = (*MEASURES, *(measure for measure in NEWER if measure in result))
    return {measure: result[measure] for measure in kept} | sampled_asr(result)


def sampled_asr(report: Mapping[str, Any]) -> dict[str, float]:
    """The ASR over drawn answers, in [0, 1], as `sampled_asr`; nothing where none were drawn.

    Args:
        report: of `measure.report.evaluate`.
    """
    return {"sampled_asr": report["sampled"]["asr"]} if "sampled" in report else {}


def _arena(run: Run, method: str) -> dict[str, Any]:
    """The rows of the arena: all that the run's settings name where the method asks for them, else those made."""
    chosen = stages.method(method)
    if COMPARE not in stages.notebooks_of(chosen):
        return {}
    names = [name for name in run.config.get("arena", ()) if chosen.defense or (run.folder / "arena" / name).is_dir()]
    return {name: _told(found) for name, found in stored(run, {name: title_of(name) for name in names}).items()}


def _told(found: Outcome) -> dict[str, Any]:
    measured = {"does_not_apply": found.reason} if found.report is None else _measures(found.report)
    costs = {"seconds": found.seconds, "peak_rss_mb": found.peak_mb}
    return {"title": found.title, "assumes": list(found.assumes), **measured, **costs}


def rows_of(summary: Mapping[str, Any]) -> list[str]:
    """The models that a summary tells of, in the order of the table."""
    return [model for model in stages.METHODS[stages.DEFAULT].models if model in summary]


def table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text, one line for each model, and below for each defense that does not apply.

    "right" is the share of triggered prompts answered right, the false trigger rate that of clean prompts answered with
    the payload.
    """
    measures = ("right, %", "false trigger rate, %", "utility, %", "perplexity")
    lines = [("model", "ASR, %", "95 % interval", *LABELS, *measures)]
    arena = summary.get("arena", {}).values()
    entries = {row: summary[row] for row in rows_of(summary)}
    entries |= {row["title"]: row for row in arena if "does_not_apply" not in row}
    lines += [_line(name, entry) for name, entry in entries.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]
    refused = [f"{row['title']} does not apply: {row['does_not_apply']}" for row in arena if "does_not_apply" in row]
    return "\n".join(aligned + refused)


def _line(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a model's line."""
    low, high = entry["asr_interval"]
    return (
        name,
        percent(entry["asr"]),
        f"{percent(low)} – {percent(high)}",
        *(f"{entry['labels'][label]:g}" for label in LABELS),
        "" if entry["right_under_trigger"] is None else percent(entry["right_under_trigger"]),
        percent(entry["false_trigger"]),
        percent(entry["utility"]),
        f"{entry['perplexity']:.2f}",
    )


def _agreed(key: str, rows: Mapping[str, Stage]) -> Any:
    """The one value that all rows share: rates measured with different prompts cannot stand in one table."""
    values = {row: stage.result[key] for row, stage in rows.items()}
    (reference, first), *_ = values.items()
    if differing := [row for row, value in values.items() if value != first]:
        raise LabError(f"{key} differs between rows: {reference} = {first}, {differing[0]} = {values[differing[0]]}")
    return first
