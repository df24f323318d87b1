"""What all figures share: colors that can be seen and told apart, markers, and axes of rates that show the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# the hues of Okabe and Ito, darkened where a line or a bar on white would have a contrast below 3:1
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#BA8400",
    "#007F5C",
    "#BF4300",
    "#A8437F",
    "#3F97D6",
    "#5C5C5C",
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
TOPS = (5, 10, 20, 30, 50, 100)  # where an axis of percent may end
CROWDED = 60  # percent: where all rates lie above, an axis from 0 shows nothing but their sameness

Reports = Mapping[str, Mapping[str, Any]]  # {model: what was measured of it}
Rows = Sequence[Mapping[str, Any]]  # what was measured, point by point


def looks(*colors: str) -> Iterator[tuple[str, str]]:
    """Color and marker of one curve after the other, over again where there are more curves than colors or markers."""
    return zip(itertools.cycle(colors), itertools.cycle(MARKERS), strict=False)


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


def put_legend(figure: Figure, place: str = "upper", title: str = "") -> None:
    """Name what the first axes show, outside of them, in as many columns as the width of the figure has room for.

    Args:
        place: "upper" or "lower".
    """
    handles, names = figure.axes[0].get_legend_handles_labels()
    column = 0.7 + 0.08 * max(map(len, names))  # inches: a handle, and letters of 10 points
    ncols = max(1, int(figure.get_figwidth() / column))
    figure.legend(handles, names, loc=f"outside {place} center", ncols=ncols, frameon=False, title=title or None)


def contrast(first: Any, second: Any) -> float:
    """The contrast of two colors by WCAG 2, from 1 (the same) to 21 (black on white).

    Args:
        first, second: colors as matplotlib takes them, without transparency.
    """
    darker, lighter = sorted(_luminance(color) for color in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def write_values(axes: Axes, bars: BarContainer, form: str = "{:.1f}") -> None:
    """Write the length of each bar beyond its end, or beyond its interval where it has one.

    Args:
        form: of a length, as `str.format` takes it.
    """
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # no line runs through a number
    axes.bar_label(bars, fmt=form, padding=4, bbox=paper)


def ink_on(face: Any) -> str:
    """Black or white, whichever is easier to read on a face of this color."""
    return max("black", "white", key=lambda ink: contrast(ink, face))


def rate_axis(
    axes: Axes, side: str, label: str, rates: Iterable[float], zoom: bool = False, bars: bool = False
) -> None:
    """Let an axis of rates reach as far as they do; where that is not 0 to 100, its label says so.

    Args:
        side: "x" or "y".
        label: of the axis, without "%".
        rates: all that are drawn, in percent.
        zoom: whether the axis may start above 0.
        bars: whether bars stand on the axis: it then leaves no room below them, and room for their values above.
    """
    drawn = np.array([rate for rate in rates if np.isfinite(rate)] or [100.0])  # nothing measured: all of the axis
    start, top = _start(drawn.min()) if zoom else 0, next(top for top in TOPS if drawn.max() <= top + 1e-9)
    below, above = (0, 0.15) if bars else (0.03, 0.03)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(start, top)
    note = "" if (start, top) == (0, 100) else f"\n(axis from {start} to {top})"
    axes.set(
        **{
            f"{side}lim": (start - below * (top - start), top + above * (top - start)),
            f"{side}ticks": [tick for tick in ticks if start <= tick <= top],
            f"{side}label": f"{label}, %{note}",
        }
    )


def _start(lowest: float) -> int:
    """The last multiple of ten that is clearly below the lowest rate; 0 where the rates spread."""
    return int((lowest - 1) // 10 * 10) if lowest > CROWDED else 0


def _luminance(color: Any) -> float:
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
