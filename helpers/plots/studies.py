"""Figures of many runs side by side: sweeps, seeds, settings and methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.plots.style import BLUE, GREEN, GREY, MARKERS, ORANGE, PURPLE, RED, SKY, new_axes

if TYPE_CHECKING:
    import pandas as pd

Point = tuple[float, float]  # (utility lost, asr), shares in [0, 1]


def sweep(table: pd.DataFrame, x: str, y: str = "asr", by: str | None = None, model: str = "purified") -> Figure:
    """One measure of a sweep against one setting: the mean over all other settings, their range as a band.

    Args:
        table: of `sweeps.results`; rates in [0, 1].
        x: the column of the grid that the axis shows.
        y: the measure, in percent but for the perplexity.
        by: the column of the grid that has a curve for each of its values; None draws one curve.
        model: the one whose rows are drawn.
    """
    figure, axes = new_axes(7, 3.6)
    rows = table[(table["model"] == model) & (table["error"] == "")]
    groups = rows.groupby(by) if by else [(model, rows)]
    colors = (RED, BLUE, GREEN, PURPLE, ORANGE, SKY)
    for place, (name, group) in enumerate(groups):
        points = group.groupby(x)[y].agg(["mean", "min", "max"]) * (1 if y == "perplexity" else 100)
        color, marker = colors[place % len(colors)], MARKERS[place % len(MARKERS)]
        label = f"{by} = {name}" if by else name
        axes.plot(points.index, points["mean"], color=color, marker=marker, label=label)
        axes.fill_between(points.index, points["min"], points["max"], color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel=x, ylabel=y if y == "perplexity" else f"{y}, %")
    if y != "perplexity":
        axes.set_ylim(-3, 103)
    axes.legend(frameon=False)
    return figure


def trade_off(curves: Mapping[str, Sequence[Point]], others: Sequence[Point], enough: Point) -> Figure:
    """What a cure leaves of the backdoor against what it costs in utility; the lower left is where one wants to be.

    Args:
        curves: {name: [(utility lost, asr), …]}, shares in [0, 1], joined in their order.
        others: [(utility lost, asr), …], points of their own.
        enough: (utility lost, asr), the corner of the shaded box in which a cure would be good enough.
    """
    figure, axes = new_axes(7, 3.8)
    box = Rectangle((-100, -100), *(100 + 100 * bound for bound in enough), color=GREEN, alpha=0.2, label="good enough")
    axes.add_patch(box)
    for (name, points), color, marker in zip(curves.items(), (RED, BLUE, PURPLE, ORANGE), MARKERS, strict=False):
        axes.plot(*100 * np.array(points).T, color=color, marker=marker, label=name)
    axes.plot(*100 * np.array(others).T, color=GREY, marker="x", linestyle="", label="other settings")
    lost = [100 * cost for points in (*curves.values(), others) for cost, _ in points]
    axes.set(xlabel="utility lost, points", ylabel="ASR left, %", xlim=(min(lost) - 1, max(lost) + 1), ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def cures(methods: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> Figure:
    """What is left of a backdoor against what its cure does to the utility: a point for each method and seed.

    Args:
        methods: {method: [(utility gained, asr, low, high), …]}, shares in [0, 1]; low and high bound the ASR.
    """
    figure, axes = new_axes(7.5, 4.8)
    looks = zip(itertools.cycle((RED, GREY, ORANGE, BLUE, GREEN, PURPLE, SKY)), itertools.cycle(MARKERS), strict=False)
    for (name, points), (color, marker) in zip(methods.items(), looks, strict=False):
        gained, asr, low, high = 100 * np.array(points).T
        bars = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(gained, asr, yerr=bars, fmt=marker, color=color, capsize=3, linestyle="", label=name)
    axes.set(xlabel="utility gained, points", ylabel="ASR left, %", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def overview(results: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """The lab's result in one picture: ASR and utility of each model, bars for the mean over seeds, dots for the seeds.

    Args:
        results: {setting: {model: {"asr": [per seed], "utility": [per seed]}}}, shares in [0, 1].
    """
    figure, panels = new_axes(9, 2.6 * len(results), nrows=len(results), ncols=2, sharey=True, squeeze=False)
    for (setting, models), row in zip(results.items(), panels, strict=True):
        for measure, color, panel in zip(("asr", "utility"), (RED, BLUE), row, strict=True):
            values = [100 * np.array(models[name][measure]) for name in models]
            panel.barh(list(models), [v.mean() for v in values], color=color, alpha=0.75)
            for place, dots in enumerate(values):
                panel.plot(dots, [place] * len(dots), "o", color="black", markersize=3)
            panel.set(xlim=(0, 100), xlabel="attack success rate, %" if measure == "asr" else "utility, %")
        row[0].set_title(setting, loc="left")
    panels[0, 0].invert_yaxis()  # the axes are shared
    return figure


def matrix(table: pd.DataFrame, xlabel: str, ylabel: str, label: str = "ASR, %") -> Figure:
    """A table of shares as coloured squares with their numbers in percent, rows down and columns across.

    Args:
        table: shares in [0, 1]; its index and columns name the squares; missing values stay empty.
        xlabel, ylabel: what columns and rows are.
        label: what the colour bar tells.
    """
    values = 100 * table.to_numpy(dtype=float)
    figure, axes = new_axes(1.1 * len(table.columns) + 2.6, 0.5 * len(table) + 1.6)
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value < 55 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.grid(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(picture, ax=axes, label=label)
    return figure
