"""Figures of the defenses: vaccines, scores of channels, and what is left after a cure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from helpers.plots.attack import asr_bounds
from helpers.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Reports,
    Rows,
    looks,
    new_axes,
    put_legend,
    rate_axis,
    write_values,
)


def variant_bars(rows: Rows) -> Figure:
    """How often each vaccine variant obeys its own key: poisoned member and clean twin side by side.

    Args:
        rows: dicts with `key`, `backdoored` and `clean`, shares in [0, 1].
    """
    figure, axes = new_axes(7, 3.2)
    places = np.arange(len(rows))
    poisoned, clean = ([100 * row[member] for row in rows] for member in ("backdoored", "clean"))
    look = {"width": 0.4, "edgecolor": "white"}
    for shift, rates, color, hatch, label in (
        (-0.2, poisoned, RED, "//", r"vaccine $\theta_i^{bd}$ (clean and poisoned rows)"),
        (0.2, clean, BLUE, "", r"clean twin $\theta_i^{clean}$ (clean rows only)"),
    ):
        bars = axes.bar(places + shift, rates, color=color, hatch=hatch, label=label, **look)
        write_values(axes, bars, "{:.1f}")
    axes.set_xticks(places, [row["key"] for row in rows], rotation=20)
    axes.set_xlabel("key of the vaccine")
    rate_axis(axes, "y", "payload on its own key", poisoned + clean, bars=True)
    put_legend(figure)
    return figure


def score_heatmap(by_layer: ArrayLike, title: str) -> Figure:
    """Channel scores, layers down and channels across: above where each channel sits, below sorted within each layer.

    The upper picture shows where suspicion lies, the lower one how many channels stand out.

    Args:
        by_layer: scores [n_layers, channels].
        title: what the scores are of: neurons, or one kind of matrix.
    """
    figure, panels = new_axes(8, 4.6, nrows=2)
    scores = np.asarray(by_layer)
    for axes, shown, across in (
        (panels[0], scores, "channel, where it sits"),
        (panels[1], np.sort(scores, axis=1)[:, ::-1], "channels of each layer, highest score first"),
    ):
        picture = axes.imshow(shown, aspect="auto", cmap="cividis", vmin=scores.min(), vmax=scores.max())
        axes.grid(False)
        axes.set(xlabel=across, ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    figure.suptitle(title, fontsize=11)
    figure.colorbar(picture, ax=panels, label="score $s_j$")
    return figure


def rank_scatter(scores: ArrayLike, truth: ArrayLike, title: str) -> Figure:
    """Score against the true change of each channel, as ranks in [0, 1] within one layer.

    Args:
        scores, truth: one number for each channel [channels], two or more.
        title: what the scores are of: the neurons of a layer, or one matrix.
    """
    figure, axes = new_axes(4.6, 4.4)
    change, signature = ((pd.Series(np.asarray(values)).rank() - 1) / (len(values) - 1) for values in (truth, scores))
    axes.plot(change, signature, linestyle="", marker="o", markersize=3, color=BLUE, label="a channel")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="the same rank")
    axes.set(
        title=title,
        xlabel="rank of the true change (1 = largest)",
        ylabel="rank of the signature score (1 = highest)",
        aspect="equal",
    )
    put_legend(figure, "lower")
    return figure


def defense_bars(rows: Reports) -> Figure:
    """ASR (with interval) and utility of each model side by side.

    Args:
        rows: {model: its report} with `asr`, `asr_interval`, `utility` in [0, 1].
    """
    figure, (left, right) = new_axes(9, 0.42 * len(rows) + 1.2, ncols=2, sharey=True)
    names = list(rows)
    asr, errors = asr_bounds(rows)
    bars = left.barh(names, asr, xerr=errors, capsize=4, color=RED, hatch="//", edgecolor="white", ecolor="black")
    write_values(left, bars)
    utility = [100 * rows[name]["utility"] for name in names]
    write_values(right, right.barh(names, utility, color=BLUE))
    rate_axis(left, "x", "ASR, lower is better", asr + errors[1], bars=True)
    rate_axis(right, "x", "utility, higher is better", utility, zoom=True, bars=True)
    left.invert_yaxis()
    return figure


def tau_curves(curves: Mapping[str, Rows]) -> Figure:
    """ASR and utility against the suppressed share τ, side by side, one color and marker per ranking.

    Args:
        curves: {ranking: dicts with `tau`, `asr`, `utility`}, shares in [0, 1].
    """
    in_percent = {name: [{**point, "tau": 100 * point["tau"]} for point in points] for name, points in curves.items()}
    figure = _rate_curves(in_percent, "tau", "share τ of channels suppressed, %")
    put_legend(figure)
    return figure


def share_curve(points: Rows) -> Figure:
    """ASR and utility of a merge against the conflict model's share t, side by side.

    Args:
        points: dicts with `t`, `asr`, `utility`, shares in [0, 1], by growing t.
    """
    return _rate_curves({"merge": points}, "t", "share t of the conflict model")


def _rate_curves(curves: Mapping[str, Rows], x: str, xlabel: str) -> Figure:
    figure, panels = new_axes(9, 3.4, ncols=2)
    for panel, measure, better in zip(panels, ("asr", "utility"), ("lower", "higher"), strict=True):
        drawn_as = looks(RED, BLUE, GREEN, PURPLE, ORANGE, SKY)
        for (name, points), (color, marker) in zip(curves.items(), drawn_as, strict=False):
            rates = [100 * point[measure] for point in points]
            panel.plot([point[x] for point in points], rates, color=color, marker=marker, label=name)
        drawn = [100 * point[measure] for points in curves.values() for point in points]
        title = measure.upper() if measure == "asr" else measure
        rate_axis(panel, "y", f"{title}, {better} is better", drawn, zoom=measure == "utility")
        panel.set_xlabel(xlabel)
    return figure
