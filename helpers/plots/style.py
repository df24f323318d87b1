"""What all figures share: colours, markers and axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
)
LABEL_COLORS = {"payload": RED, "answer": BLUE, "degenerate": ORANGE, "silent": GREY}
LABEL_HATCHES = {"payload": "//", "answer": "", "degenerate": "..", "silent": "xx"}
MARKERS = "osD^vP"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}

Reports = Mapping[str, Mapping[str, Any]]  # {model: what was measured of it}
Rows = Sequence[Mapping[str, Any]]  # what was measured, point by point


def new_axes(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure in the style of the lab and its axes.

    Args:
        width, height: inches.
        options: those of `Figure.subplots`.

    Returns:
        (figure, its axes, or an array of them where `options` ask for several).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(**options)
