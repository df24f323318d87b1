"""The figure of a purification's report."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from helpers.plots.style import BLUE, new_axes


def suppressed_by_layer(shares: Mapping[int, float]) -> Figure:
    """Draw the share of MLP channels suppressed in each layer, in percent.

    Args:
        shares: {layer: percent}, layers counted from 0.
    """
    figure, axes = new_axes(max(5.0, min(10.0, 0.4 * len(shares))), 3)
    bars = axes.bar(list(map(str, shares)), shares.values(), color=BLUE)
    if len(shares) <= 24:
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xlabel("layer")
    axes.set_ylabel("channels suppressed, %")
    axes.margins(y=0.15)
    return figure
