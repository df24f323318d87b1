"""The arena as one picture: what every defense leaves of a backdoor, and of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Reports,
    new_axes,
    put_legend,
    rate_axis,
)

# what a defense may assume, the most demanding first: it is drawn as the first of these that it needs
DEMANDS = {
    "trigger": ("X", RED),
    "unwanted answer": ("v", PURPLE),
    "family of the behavior": ("D", BLUE),
    "decoding": ("P", SKY),
    "clean base": ("s", GREEN),
    "clean rows": ("o", ORANGE),
    "weights": ("^", GREY),
}
NOTHING = "nothing: no defense"
LINE = 0.24  # inches: the height of a label


def arena(rows: Reports, assumes: Mapping[str, Sequence[str]]) -> Figure:
    """ASR against utility, a point for each defense; the best corner is the upper right one.

    Names stand in a column beside the axes, in the order of the points' heights, a thin line from each to its point.

    Args:
        rows: {defense: its report} with `asr`, `asr_interval`, `utility` in [0, 1], and `utility_interval`, a pair in
            [0, 1] or None.
        assumes: {defense: what it needs beyond the suspicious model}; a row that is not named is no defense.
    """
    figure, axes = new_axes(9, max(4.0, LINE * len(rows) + 1.6))
    kinds = {name: _kind(assumes.get(name, ())) for name in rows}
    looks = {**DEMANDS, NOTHING: ("*", "black")}
    for kind in (kind for kind in looks if kind in kinds.values()):
        marker, color = looks[kind]
        for name in (name for name in rows if kinds[name] == kind):
            drawn = axes.errorbar(
                **_point(rows[name]), marker=marker, color=color, markersize=9, elinewidth=1, mec="white", mew=0.5
            )
        drawn.set_label(kind)
    asr, utility = ([100 * row[measure] for row in rows.values()] for measure in ("asr", "utility"))
    rate_axis(axes, "x", "ASR, lower is better (to the right)", [*asr, 100])
    rate_axis(axes, "y", "utility, higher is better", utility, zoom=True)
    axes.invert_xaxis()
    _write_names(axes, rows)
    put_legend(figure, title="the most that it assumes")
    return figure


def _kind(assumed: Sequence[str]) -> str:
    return next((demand for demand in DEMANDS if demand in assumed), NOTHING)


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row stands, and how far its intervals reach, in percent."""
    found = {}
    for axis, measure in (("x", "asr"), ("y", "utility")):
        rate = 100 * row[measure]
        low, high = row[f"{measure}_interval"] or (row[measure], row[measure])
        found |= {axis: [rate], f"{axis}err": [[max(0, rate - 100 * low)], [max(0, 100 * high - rate)]]}
    return found


def _write_names(axes: Axes, rows: Reports) -> None:
    by_height = sorted(rows, key=lambda name: (-rows[name]["utility"], rows[name]["asr"]))
    for place, name in enumerate(by_height):
        axes.annotate(
            name,
            (100 * rows[name]["asr"], 100 * rows[name]["utility"]),
            (1.05, 1 - (place + 0.5) / len(rows)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
