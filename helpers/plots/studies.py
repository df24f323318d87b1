"""Figures of many runs side by side: sweeps, seeds, settings and methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.core.names import ACCESSES, ATTACKS, MERGES, MODELS, SETTINGS, TASKS, plain
from helpers.plots.style import (
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    ink_on,
    looks,
    new_axes,
    put_legend,
    rate_axis,
)

if TYPE_CHECKING:
    import pandas as pd

Point = tuple[float, float]  # (utility lost, asr), shares in [0, 1]


def sweep(
    table: pd.DataFrame,
    x: str,
    y: str = "asr",
    by: str | None = None,
    model: str = "purified",
    xlabel: str = "",
    legend: str = "",
) -> Figure:
    """One measure of a sweep against one setting: the mean over all other settings, their range as a band.

    Args:
        table: of `sweeps.results`; rates in [0, 1].
        x: the column of the grid that the axis shows.
        y: the measure, in percent but for the perplexity.
        by: the column of the grid that has a curve for each of its values; None draws one curve.
        model: the one whose rows are drawn.
        xlabel, legend: what `x` and `by` are; empty: their plain names.
    """
    figure, axes = new_axes(7, 3.6)
    rows = table[(table["model"] == model) & (table["error"] == "")]
    groups, scale = rows.groupby(by) if by else [(model, rows)], 1 if y == "perplexity" else 100
    colors = (RED, BLUE, GREEN, PURPLE, ORANGE, SKY)
    for place, (name, group) in enumerate(groups):
        points = group.groupby(x)[y].agg(["mean", "min", "max"]) * scale
        color, marker = colors[place % len(colors)], MARKERS[place % len(MARKERS)]
        axes.plot(points.index, points["mean"], color=color, marker=marker, label=_words(name))
        axes.fill_between(points.index, points["min"], points["max"], color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(xlabel or plain(x, SETTINGS))
    if y == "perplexity":
        axes.set_ylabel(y)
    else:
        rate_axis(axes, "y", "ASR" if y == "asr" else y, scale * rows[y].dropna(), zoom=y == "utility")
    if by:
        put_legend(figure, title=legend or plain(by, SETTINGS))
    return figure


def trade_off(curves: Mapping[str, Sequence[Point]], others: Sequence[Point], enough: Point) -> Figure:
    """What a cure leaves of the backdoor against what it costs in utility; the lower left is where one wants to be.

    Args:
        curves: {name: [(utility lost, asr), …]}, shares in [0, 1], joined in their order.
        others: [(utility lost, asr), …], points of their own.
        enough: (utility lost, asr), the corner of the shaded box in which a cure would be good enough.
    """
    figure, axes = new_axes(7, 4)
    corner = [100 + 100 * bound for bound in enough]
    axes.add_patch(Rectangle((-100, -100), *corner, facecolor="#D5EBE3", edgecolor=GREEN, label="good enough"))
    drawn_as = looks(RED, BLUE, PURPLE, ORANGE, GREEN, SKY)
    for (name, points), (color, marker) in zip(curves.items(), drawn_as, strict=False):
        axes.plot(*100 * np.array(points).T, color=color, marker=marker, label=name)
    axes.plot(*100 * np.array(others).T, color=GREY, marker="x", linestyle="", label="other settings")
    lost, left = 100 * np.array([*itertools.chain(*curves.values()), *others]).T
    axes.set(xlabel="utility lost, points", xlim=(lost.min() - 1, lost.max() + 1))
    rate_axis(axes, "y", "ASR left", [*left, 100 * enough[1]])
    put_legend(figure)
    return figure


def cures(methods: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> Figure:
    """What is left of a backdoor against what its cure does to the utility: a point for each method and seed.

    Args:
        methods: {method: [(utility gained, asr, low, high), …]}, shares in [0, 1]; low and high bound the ASR.
    """
    figure, axes = new_axes(7.5, 4.8)
    drawn_as = looks(RED, GREY, ORANGE, BLUE, GREEN, PURPLE, SKY)
    for (name, points), (color, marker) in zip(methods.items(), drawn_as, strict=False):
        gained, asr, low, high = 100 * np.array(points).T
        bars = np.array([asr - low, high - asr]).clip(0)
        axes.errorbar(gained, asr, yerr=bars, fmt=marker, color=color, capsize=3, linestyle="", label=name)
    axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
    axes.set_xlabel("utility gained over the backdoored model, points")
    rate_axis(axes, "y", "ASR left", [100 * point[3] for points in methods.values() for point in points])
    put_legend(figure)
    return figure


def moved(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], before: str, after: str) -> Figure:
    """How far something moves several methods between ASR and utility: a hollow point, a full one, a line between.

    Args:
        panels: {title: {method: [(asr, utility) before, (asr, utility) after]}}, shares in [0, 1]; each panel has the
            methods of the first.
        before, after: what hollow and full points are.
    """
    figure, row = new_axes(10, 4.4, ncols=len(panels), squeeze=False)
    for axes, (title, methods) in zip(row[0], panels.items(), strict=True):
        drawn_as = looks(RED, GREY, ORANGE, GREEN, BLUE, PURPLE)
        for (name, points), (color, marker) in zip(methods.items(), drawn_as, strict=False):
            asr, utility = 100 * np.array(points).T
            axes.plot(asr, utility, color=color, linewidth=1)
            axes.plot(asr[0], utility[0], marker, color=color, mfc="white", markersize=9)
            axes.plot(asr[1], utility[1], marker, color=color, markersize=9, linestyle="", label=name)
        axes.set_title(title, loc="left", fontsize=11)
        found = 100 * np.array([point for points in methods.values() for point in points])
        rate_axis(axes, "x", "ASR left", [*found[:, 0], 100])
        rate_axis(axes, "y", "utility", found[:, 1], zoom=True)
        axes.plot([], [], "o", color="black", mfc="white", markersize=9, label=before)
        axes.plot([], [], "o", color="black", markersize=9, label=after)
    put_legend(figure)
    return figure


def overview(results: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """The lab's result in one picture: ASR and utility of each model, bars for the mean over seeds, dots for the seeds.

    Args:
        results: {setting: {model: {"asr": [per seed], "utility": [per seed]}}}, shares in [0, 1]; settings and models
            by their keys, which are shown as plain names.
    """
    lines = sum(map(len, results.values()))
    figure, panels = new_axes(9.5, 0.32 * lines + 0.8 * len(results) + 0.4, nrows=len(results), ncols=2, squeeze=False)
    labels = {"asr": "attack success rate left", "utility": "utility"}
    for (measure, label), color, column in zip(labels.items(), (RED, BLUE), panels.T, strict=True):
        drawn = [[100 * np.array(measured[measure]) for measured in models.values()] for models in results.values()]
        for panel, models, rates in zip(column, results.values(), drawn, strict=True):
            _seed_bars(panel, [plain(model, MODELS) for model in models], rates, color)
            rate_axis(panel, "x", label, np.concatenate(sum(drawn, [])), zoom=measure == "utility")
    for (setting, _), (left, right) in zip(results.items(), panels, strict=True):
        left.set_title(_words(setting), loc="left", fontsize=11)
        right.tick_params(labelleft=False)
    put_legend(figure, "lower")
    return figure


def _seed_bars(panel: Axes, names: Sequence[str], rates: Sequence[np.ndarray], color: str) -> None:
    """A bar for the mean of each model's rates [seeds], dots for the rates, and the mean in figures at the right."""
    means = [values.mean() for values in rates]
    panel.barh(names, means, color=color, label="mean over the seeds, in figures at the right")
    for place, (mean, dots) in enumerate(zip(means, rates, strict=True)):
        panel.plot(dots, [place] * len(dots), "o", color="black", markersize=3, label="" if place else "one seed")
        panel.text(1.11, place, f"{mean:.1f}", ha="right", va="center", transform=panel.get_yaxis_transform())
    panel.invert_yaxis()


def matrix(table: pd.DataFrame, xlabel: str, ylabel: str, label: str = "ASR, %") -> Figure:
    """A table of shares as colored squares with their numbers in percent, rows down and columns across.

    Args:
        table: shares in [0, 1]; its index and columns name the squares; missing values stay empty.
        xlabel, ylabel: what columns and rows are.
        label: what the color bar tells.
    """
    values = 100 * table.to_numpy(dtype=float)
    top = min(max(10 * np.ceil(np.nanmax(values) / 10), 10), 100)  # full tens, so that small differences show
    figure, axes = new_axes(1.1 * len(table.columns) + 2.6, 0.5 * len(table) + 1.6)
    colors = matplotlib.colormaps["cividis"]
    picture = axes.imshow(values, cmap=colors, vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = ink_on(colors(value / top))
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(table.columns)), [_words(name) for name in table.columns])
    axes.set_yticks(range(len(table)), [_words(name) for name in table.index])
    axes.grid(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(picture, ax=axes, label=label)
    return figure


def _words(key: object) -> str:
    return plain(key, ATTACKS, TASKS, MERGES, ACCESSES)
