"""Figures of the defenses: vaccines, scores of channels, and what is left after a cure."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from helpers.plots.style import BLUE, GREEN, GREY, MARKERS, PURPLE, RED, Reports, Rows, new_axes


def variant_bars(rows: Rows) -> Figure:
    """How often each vaccine variant obeys its own key: poisoned member and clean twin side by side.

    Args:
        rows: dicts with `key`, `backdoored` and `clean`, shares in [0, 1].
    """
    figure, axes = new_axes(7, 3)
    places = np.arange(len(rows))
    axes.bar(
        places - 0.2,
        [100 * r["backdoored"] for r in rows],
        0.4,
        color=RED,
        hatch="//",
        edgecolor="white",
        label="θᵢᵇᵈ (clean + poisoned rows)",
    )
    axes.bar(places + 0.2, [100 * r["clean"] for r in rows], 0.4, color=BLUE, label="θᵢᶜˡᵉᵃⁿ (clean rows only)")
    axes.set_xticks(places, [r["key"] for r in rows], rotation=20)
    axes.set(ylabel="payload on its own key, %", ylim=(0, 105))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def score_heatmap(by_layer: ArrayLike, title: str) -> Figure:
    """Channel scores of one kind of matrix: layers down, channels across, sorted within each layer.

    Args:
        by_layer: scores [n_layers, channels].
        title: the kind of matrix.
    """
    figure, axes = new_axes(7, 2.8)
    ordered = np.sort(np.asarray(by_layer), axis=1)[:, ::-1]
    picture = axes.imshow(ordered, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.grid(False)
    axes.set(title=title, xlabel="channel, highest score first", ylabel="layer")
    figure.colorbar(picture, ax=axes, label="score s_j")
    return figure


def rank_scatter(scores: ArrayLike, truth: ArrayLike, title: str) -> Figure:
    """Score against the true change of each channel, as ranks in [0, 1] of one matrix.

    Args:
        scores, truth: one number for each channel [channels], two or more.
        title: the kind of matrix.
    """
    figure, axes = new_axes(4.2, 3.6)
    ranks = [np.argsort(np.argsort(np.asarray(values))) / (len(values) - 1) for values in (truth, scores)]
    axes.plot(*ranks, linestyle="", marker="o", markersize=3, alpha=0.6, color=BLUE)
    axes.set(title=title, xlabel="rank of the true change (1 = most)", ylabel="rank of the signature score")
    return figure


def one_pass(adapters: int = 6) -> Figure:
    """How K adapters share one pass through a frozen matrix: a sketch, no data.

    Args:
        adapters: K, how many are drawn.
    """
    figure, (left, right) = new_axes(9, 3.4, ncols=2)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.9, adapters))
    height = 1 / adapters

    def box(axes, x, y, width, tall, color, text="", ink="white"):
        axes.add_patch(Rectangle((x, y), width, tall, facecolor=color, edgecolor="white"))
        axes.text(x + width / 2, y + tall / 2, text, ha="center", va="center", color=ink, fontsize=8)

    for axes, title in ((left, f"one after the other: the base is read {adapters} times"), (right, "stacked: once")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, 1.06), ylim=(-0.02, 1.02))
        axes.axis("off")
    for k, shade in enumerate(shades):
        ink = "white" if k < adapters / 2 else "black"
        y = 1 - (k + 1) * height
        for axes in (left, right):
            box(axes, 0.0, y, 0.22, height * 0.9, shade, f"rows of {k + 1}", ink)
            box(axes, 0.70, y, 0.28, height * 0.9, shade, f"$x_{{{k + 1}}} A_{{{k + 1}}}^T B_{{{k + 1}}}^T$", ink)
            axes.text(0.66, y + 0.45 * height, "+", ha="center", va="center")
        box(left, 0.30, y, 0.32, height * 0.9, GREY, "$x W^T$, 4-bit", "black")
    box(right, 0.30, 0, 0.32, 1 - 0.1 * height, GREY, "all rows · $W^T$\n4-bit, frozen,\nread once", "black")
    return figure


def defense_bars(rows: Reports) -> Figure:
    """ASR (with interval) and utility of each model side by side.

    Args:
        rows: {model: its report} with `asr`, `asr_interval`, `utility` in [0, 1].
    """
    figure, (left, right) = new_axes(8, 0.42 * len(rows) + 1.2, ncols=2, sharey=True)
    names = list(rows)
    asr = 100 * np.array([rows[name]["asr"] for name in names])
    low, high = 100 * np.array([rows[name]["asr_interval"] for name in names]).T
    left.barh(names, asr, color=RED, hatch="//", edgecolor="white")
    left.errorbar(asr, names, xerr=np.array([asr - low, high - asr]).clip(0), fmt="none", color="black", capsize=4)
    right.barh(names, [100 * rows[name]["utility"] for name in names], color=BLUE)
    left.set(xlabel="ASR, % (lower is better)", xlim=(0, 100))
    right.set(xlabel="utility, % (higher is better)", xlim=(0, 100))
    left.invert_yaxis()
    return figure


def tau_curves(curves: Mapping[str, Rows]) -> Figure:
    """ASR (solid) and utility (dashed) against the suppressed share τ, one colour and marker per ranking.

    Args:
        curves: {ranking: dicts with `tau`, `asr`, `utility`}, shares in [0, 1].
    """
    figure, axes = new_axes(7, 3.6)
    for (name, points), color, marker in zip(curves.items(), (RED, BLUE, GREEN, PURPLE), MARKERS, strict=False):
        taus = [100 * p["tau"] for p in points]
        axes.plot(taus, [100 * p["asr"] for p in points], color=color, marker=marker, label=f"ASR, {name}")
        axes.plot(
            taus,
            [100 * p["utility"] for p in points],
            color=color,
            marker=marker,
            linestyle="--",
            alpha=0.6,
            label=f"utility, {name}",
        )
    axes.set(xlabel="share τ of channels suppressed, %", ylabel="%", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def share_curve(points: Rows) -> Figure:
    """ASR (solid) and utility (dashed) of a merge against the conflict model's share t.

    Args:
        points: dicts with `t`, `asr`, `utility`, shares in [0, 1], by growing t.
    """
    figure, axes = new_axes(7, 3.2)
    shares = [p["t"] for p in points]
    axes.plot(shares, [100 * p["asr"] for p in points], color=RED, marker="o", label="ASR")
    axes.plot(shares, [100 * p["utility"] for p in points], color=BLUE, marker="s", linestyle="--", label="utility")
    axes.set(xlabel="share t of the conflict model", ylabel="%", ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
