"""Every figure of the lab in one style: colors that color-blind readers can tell apart, with markers and hatches.

A function takes plain results and returns a matplotlib figure; `image` writes it into the run's folder and shows it
with alternative text and a caption. `table` gives every table one form.
"""

from helpers.plots.attack import block_curves, family_bars, format_intervals, label_bars, who_knows
from helpers.plots.contest import arena
from helpers.plots.defense import (
    defense_bars,
    rank_scatter,
    score_heatmap,
    share_curve,
    tau_curves,
    variant_bars,
)
from helpers.plots.diagrams import bdvax_diagram, conflict_diagram, one_pass
from helpers.plots.picture import image, save
from helpers.plots.purify import suppressed_by_layer
from helpers.plots.studies import cures, matrix, moved, overview, sweep, trade_off
from helpers.plots.table import results, table

__all__ = [
    "arena",
    "bdvax_diagram",
    "block_curves",
    "conflict_diagram",
    "cures",
    "defense_bars",
    "family_bars",
    "format_intervals",
    "image",
    "label_bars",
    "matrix",
    "moved",
    "one_pass",
    "overview",
    "rank_scatter",
    "results",
    "save",
    "score_heatmap",
    "share_curve",
    "suppressed_by_layer",
    "sweep",
    "table",
    "tau_curves",
    "trade_off",
    "variant_bars",
    "who_knows",
]
