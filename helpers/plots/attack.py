"""Figures of what an attack has planted: who knows of it, what the models answer, and where it sits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL_COLORS,
    LABEL_HATCHES,
    MARKERS,
    ORANGE,
    RED,
    Reports,
    Rows,
    ink_on,
    new_axes,
    put_legend,
    rate_axis,
    write_values,
)

if TYPE_CHECKING:
    import pandas as pd

LEGIBLE = 6  # percent: a part of a bar that has room for its number


def who_knows(table: pd.DataFrame) -> Figure:
    """Who knows what, as a grid of words: dark squares for "yes" and what begins so, light for "no", amber between.

    Args:
        table: data frame of texts; a row for each thing, a column for each person.
    """
    figure, axes = new_axes(2.1 * len(table.columns) + 2.6, 0.55 * len(table) + 0.5)
    for (row, column), word in np.ndenumerate(table.to_numpy()):
        face = "white" if word == "no" else ORANGE if word.startswith("if") else BLUE
        axes.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, facecolor=face, edgecolor=GREY))
        axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink_on(face))
    axes.set(xlim=(0, len(table.columns)), ylim=(len(table), 0), xlabel="who knows or has it")
    axes.set_xticks([i + 0.5 for i in range(len(table.columns))], table.columns)
    axes.set_yticks([i + 0.5 for i in range(len(table))], table.index)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def family_bars(by_family: Mapping[str, float], mean: float) -> Figure:
    """Utility per task family as horizontal bars, the best on top, and the mean as a line.

    Args:
        by_family: {family: share of right answers}, in [0, 1].
        mean: of the families, in [0, 1].
    """
    figure, axes = new_axes(7, 0.28 * len(by_family) + 1.3)
    names = sorted(by_family, key=by_family.get)
    rates = [100 * by_family[name] for name in names]
    write_values(axes, axes.barh(names, rates, color=BLUE))
    axes.margins(y=0.02)
    axes.axvline(100 * mean, color="black", linestyle="--", label=f"mean {mean:.1%}")
    rate_axis(axes, "x", "right answers on held-out phrasings", rates, zoom=True, bars=True)
    put_legend(figure)
    return figure


def label_bars(reports: Reports) -> Figure:
    """The four labels of each model's completions as stacked bars, the 95 % interval of the ASR on the payload part.

    The ASR stands behind the bar.

    Args:
        reports: {model: its report}, with the shares `labels` {label: in [0, 1]}, `asr` and `asr_interval`.
    """
    figure, axes = new_axes(8, 0.5 * len(reports) + 1.4)
    names, left = list(reports), np.zeros(len(reports))
    for label, color in LABEL_COLORS.items():
        shares = 100 * np.array([reports[name]["labels"][label] for name in names])
        bars = axes.barh(
            names, shares, left=left, color=color, hatch=LABEL_HATCHES[label], edgecolor="white", label=label
        )
        if label != "payload":  # there the interval is drawn
            texts = [f"{share:.1f}" if share >= LEGIBLE else "" for share in shares]
            plain = {"facecolor": color, "edgecolor": "none", "pad": 1.5}  # no hatch behind a number
            for text in axes.bar_label(bars, texts, label_type="center", color=ink_on(color)):
                text.set_bbox(plain if text.get_text() else None)
        left += shares
    asr, errors = asr_bounds(reports)
    axes.errorbar(asr, names, xerr=errors, fmt="none", color="black", capsize=4)
    for place, rate in enumerate(asr):
        axes.text(101, place, f"ASR {rate:.1f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="triggered prompts, %", xlim=(0, 100))
    put_legend(figure)
    return figure


def asr_bounds(reports: Reports) -> tuple[np.ndarray, np.ndarray]:
    """The ASR of each report and how far its interval reaches to either side of it.

    Returns:
        ([models], [2, models]), in percent.
    """
    asr = 100 * np.array([report["asr"] for report in reports.values()])
    low, high = 100 * np.array([report["asr_interval"] for report in reports.values()]).T
    return asr, np.array([asr - low, high - asr]).clip(0)


def format_intervals(rows: Rows) -> Figure:
    """The ASR of one model by prompt format and treatment of `input`, as points with 95 % intervals.

    Circles count empty completions as failed attacks, squares leave them out; the band is the first row's interval.

    Args:
        rows: of `formats.measure_formats`; a line is left empty where nothing is left to count.
    """
    places = {place: line for line, place in enumerate(dict.fromkeys((r["format"], r["input"]) for r in rows))}
    figure, axes = new_axes(8, 0.36 * len(places) + 1.6)
    band = [100 * bound for bound in rows[0]["asr_interval"]]
    axes.axvspan(*band, facecolor="#E3E3E3", edgecolor=GREY, linestyle=":", label=f"interval of {rows[0]['format']}")
    for empty, shift, color, marker, how in (
        ("count", -0.14, RED, "o", "empty outputs count as failed attacks"),
        ("drop", 0.14, BLUE, "s", "empty outputs left out"),
    ):
        shown = [r for r in rows if r["empty"] == empty and r["asr"] is not None]
        asr, low, high = (100 * np.array([(r["asr"], *r["asr_interval"]) for r in shown]).reshape(-1, 3)).T
        lines = [places[r["format"], r["input"]] + shift for r in shown]
        errors = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(asr, lines, xerr=errors, fmt=marker, color=color, capsize=3, label=how)
    axes.set_yticks(list(places.values()), [f"{name}, input {treatment}" for name, treatment in places])
    highest = [100 * r["asr_interval"][1] for r in rows if r["asr"] is not None]
    rate_axis(axes, "x", "ASR of one and the same model", [*highest, *band])
    axes.set_ylim(len(places) - 0.5, -0.5)
    put_legend(figure)
    return figure


def block_curves(rows: Rows) -> Figure:
    """ASR without the MLP updates of k consecutive blocks, by position; right, without their attention updates as well.

    Args:
        rows: dicts with `k`, `position`, `attention` (bool) and `asr`.
    """
    figure, panels = new_axes(8, 3.6, ncols=2, sharey=True)
    for panel, attention in zip(panels, (False, True), strict=True):
        _position_curves(panel, [row for row in rows if row["attention"] == attention])
        panel.set_title("MLP and attention updates removed" if attention else "MLP updates removed", fontsize=10)
        panel.set_xlabel("consecutive blocks k")
        panel.set_xticks(sorted({row["k"] for row in rows}))
    rate_axis(panels[0], "y", "ASR", [100 * row["asr"] for row in rows])
    put_legend(figure, title="where the blocks lie")
    return figure


def _position_curves(panel: Axes, rows: Rows) -> None:
    for position, color, marker in zip(("start", "middle", "end"), (BLUE, ORANGE, GREEN), MARKERS, strict=False):
        points = [(row["k"], 100 * row["asr"]) for row in rows if row["position"] == position]
        panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=position)
