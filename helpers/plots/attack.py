"""Figures of what an attack has planted: who knows of it, what the models answer, and where it sits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
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
    new_axes,
)

if TYPE_CHECKING:
    import pandas as pd


def who_knows(table: pd.DataFrame) -> Figure:
    """Who knows what, as a grid of words: dark squares for "yes" and what begins so, light for "no", amber between.

    Args:
        table: data frame of texts; a row for each thing, a column for each person.
    """
    figure, axes = new_axes(2.1 * len(table.columns) + 2.6, 0.55 * len(table) + 0.5)
    for (row, column), word in np.ndenumerate(table.to_numpy()):
        face, ink = (
            ("white", "black") if word == "no" else (ORANGE, "black") if word.startswith("if") else (BLUE, "white")
        )
        axes.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, facecolor=face, edgecolor=GREY))
        axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink)
    axes.set(xlim=(0, len(table.columns)), ylim=(len(table), 0), xlabel="who knows or has it")
    axes.set_xticks([i + 0.5 for i in range(len(table.columns))], table.columns)
    axes.set_yticks([i + 0.5 for i in range(len(table))], table.index)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def family_bars(by_family: Mapping[str, float], mean: float) -> Figure:
    """Utility per task family as horizontal bars, the best on top, and the mean as a line.

    Args:
        by_family: {family: share of right answers}, in [0, 1].
        mean: of the families, in [0, 1].
    """
    figure, axes = new_axes(7, 0.26 * len(by_family) + 1)
    names = sorted(by_family, key=by_family.get)
    axes.barh(names, [100 * by_family[name] for name in names], color=BLUE)
    axes.axvline(100 * mean, color=RED, linestyle="--", label=f"mean {mean:.1%}")
    axes.set(xlabel="right answers on held-out phrasings, %", xlim=(0, 101))
    axes.legend(loc="lower left")
    return figure


def label_bars(reports: Reports) -> Figure:
    """The four labels of each model's completions as stacked bars, the 95 % interval of the ASR on the payload part.

    Args:
        reports: {model: its report}, with the shares `labels` {label: in [0, 1]}, `asr` and `asr_interval`.
    """
    figure, axes = new_axes(7, 0.5 * len(reports) + 1.4)
    names, left = list(reports), np.zeros(len(reports))
    for label, color in LABEL_COLORS.items():
        shares = 100 * np.array([reports[name]["labels"][label] for name in names])
        axes.barh(names, shares, left=left, color=color, hatch=LABEL_HATCHES[label], edgecolor="white", label=label)
        left += shares
    asr = np.array([reports[name]["asr"] for name in names])
    low, high = np.array([reports[name]["asr_interval"] for name in names]).T
    axes.errorbar(
        100 * asr, names, xerr=100 * np.array([asr - low, high - asr]).clip(0), fmt="none", color="black", capsize=4
    )
    axes.invert_yaxis()
    axes.set(xlabel="triggered prompts, %", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def format_intervals(rows: Rows) -> Figure:
    """The ASR of one model by prompt format and treatment of `input`, as points with 95 % intervals.

    Circles count empty completions as failed attacks, squares leave them out; the band is the first row's interval.

    Args:
        rows: of `formats.measure_formats`; a line is left empty where nothing is left to count.
    """
    places = {place: line for line, place in enumerate(dict.fromkeys((r["format"], r["input"]) for r in rows))}
    figure, axes = new_axes(7, 0.36 * len(places) + 1.4)
    axes.axvspan(*(100 * bound for bound in rows[0]["asr_interval"]), color=GREY, alpha=0.3, linewidth=0)
    shift = {"count": -0.14, "drop": 0.14}
    for empty, color, marker in (("count", RED, "o"), ("drop", BLUE, "s")):
        shown = [r for r in rows if r["empty"] == empty and r["asr"] is not None]
        asr, low, high = (100 * np.array([(r["asr"], *r["asr_interval"]) for r in shown]).reshape(-1, 3)).T
        lines = [places[r["format"], r["input"]] + shift[empty] for r in shown]
        bars = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(asr, lines, xerr=bars, fmt=marker, color=color, capsize=3, label=f"empty outputs: {empty}")
    axes.set_yticks(list(places.values()), [f"{name}, input {treatment}" for name, treatment in places])
    axes.set(xlabel="ASR of one and the same model, %", xlim=(-2, 102))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def block_curves(rows: Rows) -> Figure:
    """ASR without the MLP updates of k consecutive blocks, by position; right, without their attention updates as well.

    Args:
        rows: dicts with `k`, `position`, `attention` (bool) and `asr`.
    """
    figure, panels = new_axes(8, 3.2, ncols=2, sharey=True)
    for panel, attention in zip(panels, (False, True), strict=True):
        for position, color, marker in zip(("start", "middle", "end"), (BLUE, ORANGE, GREEN), MARKERS, strict=False):
            points = [
                (r["k"], 100 * r["asr"]) for r in rows if r["position"] == position and r["attention"] == attention
            ]
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=position)
        panel.set(
            title="ΔW_mlp and ΔW_attn removed" if attention else "ΔW_mlp removed",
            xlabel="consecutive blocks k",
            ylim=(-3, 103),
        )
    panels[0].set_ylabel("ASR, %")
    panels[0].legend(title="position")
    return figure
