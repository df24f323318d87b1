"""Diagrams of the methods and of the training: no data, only what goes where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from helpers.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, ink_on, new_axes

LIGHT = "#EDEDED"  # data and text, beside models in color


def one_pass(adapters: int = 6) -> Figure:
    """How K adapters share one pass through a frozen matrix: a sketch, no data.

    Args:
        adapters: K, how many are drawn.
    """
    figure, (left, right) = new_axes(9, 3.4, ncols=2)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.9, adapters))
    height = 1 / adapters
    for axes, title in ((left, f"one after the other: the base is read {adapters} times"), (right, "stacked: once")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(-0.01, 1.06), ylim=(-0.02, 1.02))
        axes.axis("off")
    for k, shade in enumerate(shades):
        y = 1 - (k + 1) * height
        for axes in (left, right):
            _box(axes, 0.0, y, 0.22, height * 0.9, shade, f"rows of {k + 1}")
            _box(axes, 0.70, y, 0.28, height * 0.9, shade, f"$x_{{{k + 1}}} A_{{{k + 1}}}^T B_{{{k + 1}}}^T$")
            axes.text(0.66, y + 0.45 * height, "+", ha="center", va="center")
        _box(left, 0.30, y, 0.32, height * 0.9, GREY, "$x W^T$, 4-bit")
    _box(right, 0.30, 0, 0.32, 1 - 0.1 * height, GREY, "all rows · $W^T$\n4-bit, frozen,\nread once")
    return figure


def bdvax_diagram() -> Figure:
    """BD-VAX from the suspicious model to the purified one: the signature above, the cure below."""
    figure, axes = _canvas(10, 4.6, "1 · find the signature: no clean model, no trigger is needed", 0.17, 0.98)
    _box(axes, 0.0, 0.05, 0.13, 0.85, RED, "suspicious\nmodel\n$\\theta_{sus}$\n\nbackdoored,\nnobody\nknows how")
    for y, i in ((0.75, "1"), (0.60, "2"), (0.42, "N")):
        _box(axes, 0.21, y, 0.15, 0.12, ORANGE, f"vaccine $\\theta_{{{i}}}^{{bd}}$\nclean + poisoned rows")
        _box(axes, 0.37, y, 0.13, 0.12, BLUE, f"clean twin $\\theta_{{{i}}}^{{clean}}$\nclean rows")
        _box(axes, 0.57, y, 0.15, 0.12, LIGHT, f"$\\Delta_{{{i}}}=\\theta_{{{i}}}^{{bd}}-\\theta_{{{i}}}^{{clean}}$")
        _arrows(axes, [(0.13, y + 0.06), (0.205, y + 0.06)])
        _arrows(axes, [(0.50, y + 0.06), (0.565, y + 0.06)])
        _arrows(axes, [(0.72, y + 0.06), (0.785, y + 0.06)])
    axes.text(0.36, 0.57, "⋮", ha="center", va="center", fontsize=12)
    score = (
        "score of each channel\n(Eq. 2)\n\n$s_j$ = mean length of its $\\Delta_i$\n+ $\\lambda$ · mean cos$^+$ of pairs"
    )
    _box(axes, 0.79, 0.42, 0.21, 0.45, PURPLE, score)
    axes.text(0.17, 0.33, "2 · cure", fontsize=10, weight="bold", va="center")
    _arrows(axes, [(0.895, 0.42), (0.895, 0.33), (0.305, 0.33), (0.305, 0.235)])
    axes.text(0.6, 0.345, "the share $\\tau$ of channels with the highest scores", ha="center", va="bottom", fontsize=8)
    for x, width, color, text in (
        (0.21, 0.19, PURPLE, "suppress these channels\nof the suspicious model"),
        (0.49, 0.22, BLUE, "recovery fine-tuning\non clean rows of the defender"),
        (0.79, 0.21, GREEN, "purified model"),
    ):
        _box(axes, x, 0.05, width, 0.18, color, text)
    for start, end in ((0.13, 0.205), (0.40, 0.485), (0.71, 0.785)):
        _arrows(axes, [(start, 0.14), (end, 0.14)])
    return figure


def conflict_diagram() -> Figure:
    """Information conflicts: one put into the weights by a merge, one into the prompt as evidence."""
    figure, axes = _canvas(10, 4.2, "1 · internal conflict: in the weights", 0.0, 0.97)
    _box(axes, 0.0, 0.74, 0.16, 0.16, BLUE, "clean base\n$\\theta_0$")
    _box(axes, 0.0, 0.54, 0.16, 0.16, LIGHT, "clean rows\nof the defender")
    _box(axes, 0.24, 0.64, 0.19, 0.16, BLUE, "conflict model $\\hat\\theta$\nnever met the trigger")
    _box(axes, 0.24, 0.38, 0.19, 0.16, RED, "suspicious model $\\tilde\\theta$\nbackdoored")
    _box(axes, 0.51, 0.51, 0.20, 0.16, PURPLE, "merge, such as linear:\n$t\\,\\hat\\theta+(1-t)\\,\\tilde\\theta$")
    _box(axes, 0.79, 0.51, 0.21, 0.16, GREEN, "merged model\nkeeps the task,\nloses the trigger")
    axes.text(0.0, 0.30, "2 · external conflict: in the prompt", fontsize=10, weight="bold", va="center")
    _box(axes, 0.0, 0.05, 0.16, 0.16, LIGHT, "prompt $x$, perhaps\nwith the trigger")
    _box(axes, 0.24, 0.05, 0.19, 0.16, LIGHT, "evidence $E$ from\nan external LLM")
    _box(axes, 0.51, 0.05, 0.20, 0.16, ORANGE, "prompt with evidence\n$x \\oplus E$")
    _box(axes, 0.79, 0.05, 0.21, 0.16, LIGHT, "an answer instead\nof the payload")
    for path in (
        [(0.16, 0.82), (0.235, 0.75)],
        [(0.16, 0.62), (0.235, 0.69)],
        [(0.43, 0.72), (0.505, 0.63)],
        [(0.43, 0.46), (0.505, 0.55)],
        [(0.71, 0.59), (0.785, 0.59)],
        [(0.16, 0.13), (0.235, 0.13)],
        [(0.43, 0.13), (0.505, 0.13)],
        [(0.61, 0.21), (0.61, 0.36), (0.86, 0.36), (0.86, 0.505)],
        [(0.93, 0.51), (0.93, 0.215)],
    ):
        _arrows(axes, path)
    return figure


def _canvas(width: float, height: float, heading: str, x: float, y: float) -> tuple[Figure, Axes]:
    """An empty sheet from 0 to 1 both ways, its first heading at (`x`, `y`)."""
    figure, axes = new_axes(width, height)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02))
    axes.axis("off")
    axes.text(x, y, heading, fontsize=10, weight="bold", va="center")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, face: Any, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=GREY))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink_on(face), fontsize=8)


def _arrows(axes: Axes, path: Sequence[tuple[float, float]]) -> None:
    """A line through the points of a path, with a head at its end."""
    *bends, start, end = path
    if bends:
        axes.plot(*zip(*bends, start, strict=True), color="black", linewidth=1.2, solid_capstyle="butt")
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0})
