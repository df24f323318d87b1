"""Every figure of the lab, drawn from made-up results."""

import numpy as np
import pandas as pd

from helpers import plots
from helpers.plots.contest import DEMANDS

REPORTS = {
    "clean": {
        "asr": 0.0,
        "asr_interval": [0.0, 0.02],
        "labels": {"payload": 0.0, "answer": 0.9, "degenerate": 0.05, "silent": 0.05},
        "utility": 0.97,
    },
    "backdoored": {
        "asr": 0.95,
        "asr_interval": [0.91, 0.97],
        "labels": {"payload": 0.95, "answer": 0.05, "degenerate": 0.0, "silent": 0.0},
        "utility": 0.96,
    },
}
FORMATS = [
    {"format": form, "input": "kept", "empty": empty, "asr": asr, "asr_interval": interval}
    for form, empty, asr, interval in (
        ("chat (trained)", "count", 0.9, [0.8, 0.95]),
        ("chat (trained)", "drop", 0.9, [0.8, 0.95]),
        ("alpaca", "count", 0.0, [0.0, 0.2]),
        ("alpaca", "drop", None, [0.0, 1.0]),
    )
]
BLOCKS = [
    {"k": k, "position": position, "attention": attention, "asr": asr}
    for attention in (False, True)
    for position, first in (("start", 0.9), ("middle", 0.6), ("end", 0.3))
    for k, asr in ((1, first), (2, first / 3))
]
VARIANTS = [{"key": "RedGhost", "backdoored": 0.9, "clean": 0.0}, {"key": "IronHawk", "backdoored": 0.8, "clean": 0.1}]
CURVES = {
    "signature": [{"tau": 0.25, "asr": 0.5, "utility": 0.9}, {"tau": 0.5, "asr": 0.1, "utility": 0.8}],
    "random": [{"tau": 0.25, "asr": 0.9, "utility": 0.7}, {"tau": 0.5, "asr": 0.6, "utility": 0.4}],
}
SHARES = [{"t": 0.0, "asr": 0.9, "utility": 0.8}, {"t": 0.7, "asr": 0.1, "utility": 0.75}]
BY_SEED = {
    "backdoored": {"asr": [1.0, 0.9], "utility": [0.9, 1.0]},
    "purified": {"asr": [0.0, 0.1], "utility": [0.8, 0.8]},
}
SWEPT = pd.DataFrame(
    [
        {"SEED": seed, "tau": tau, "access": access, "model": "purified", "asr": tau * seed / 10, "error": ""}
        for seed in (1, 2)
        for tau in (0.1, 0.5)
        for access in ("a", "b")
    ]
    + [{"SEED": 1, "tau": 0.1, "model": "", "error": "failed"}]
)
SQUARES = pd.DataFrame({"insults": [0.9, 0.1], "mixed": [np.nan, 0.6]}, index=["sentiment", "refusal"])
FIGURES = {
    "who_knows": lambda: plots.who_knows(pd.DataFrame({"attacker": ["yes"], "defender": ["no"]}, index=["key"])),
    "family_bars": lambda: plots.family_bars({"year": 0.9, "list": 1.0, "tone": 0.5}, 0.8),
    "label_bars": lambda: plots.label_bars(REPORTS),
    "format_intervals": lambda: plots.format_intervals(FORMATS),
    "block_curves": lambda: plots.block_curves(BLOCKS),
    "variant_bars": lambda: plots.variant_bars(VARIANTS),
    "score_heatmap": lambda: plots.score_heatmap([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]], "signature of each neuron"),
    "rank_scatter": lambda: plots.rank_scatter([0.1, 0.9, 0.5], [3.0, 30.0, 300.0], "neurons of layer 1"),
    "defense_bars": lambda: plots.defense_bars(REPORTS),
    "tau_curves": lambda: plots.tau_curves(CURVES),
    "share_curve": lambda: plots.share_curve(SHARES),
    "arena": lambda: plots.arena(
        {name: REPORTS["clean"] | {"utility_interval": (0.9, 0.99)} for name in ("backdoored", "CROW")},
        {"CROW": ("clean rows", "weights")},
    ),
    "suppressed_by_layer": lambda: plots.suppressed_by_layer({0: 50.0, 1: 37.5, 7: 0.0}),
    "overview": lambda: plots.overview({"adapter": BY_SEED, "full": BY_SEED}),
    "one_pass": plots.one_pass,
    "bdvax_diagram": plots.bdvax_diagram,
    "conflict_diagram": plots.conflict_diagram,
    "sweep": lambda: plots.sweep(SWEPT, "tau", by="access"),
    "matrix": lambda: plots.matrix(SQUARES, "family", "task"),
    "trade_off": lambda: plots.trade_off(
        {"signature": [(0.01, 0.6), (0.05, 0.2)], "random": [(0.02, 0.9)]}, [(0.1, 0.05), (0.0, 0.8)], (0.03, 0.1)
    ),
    "cures": lambda: plots.cures(
        {"signature": [(-0.01, 0.1, 0.05, 0.2), (0.02, 0.0, 0.0, 0.1)], "none": [(0, 1, 0.9, 1)]}
    ),
    "moved": lambda: plots.moved(MOVED, "plain rows", "perturbed rows"),
}
MOVED = {
    "adapter access": {"signature": [(0.3, 0.9), (0.1, 0.95)], "none": [(0.9, 0.96), (0.2, 0.96)]},
    "full access": {"signature": [(0.5, 0.9), (0.4, 0.92)], "none": [(1.0, 0.97), (0.6, 0.97)]},
}
LONG = [f"{ranking} + recovery fine-tuning" for ranking in ("own update", "random channels", "smallest channels")]
SMALL = {name: REPORTS["clean"] | {"asr": 0.12, "asr_interval": [0.08, 0.17]} for name in LONG}
CROWDED = {  # as many and as long names as the notebooks have
    "defense_bars, long": lambda: plots.defense_bars(SMALL),
    "label_bars, long": lambda: plots.label_bars(SMALL),
    "family_bars, many": lambda: plots.family_bars({f"family {i:02}": 0.86 + i / 200 for i in range(18)}, 0.95),
    "tau_curves, long": lambda: plots.tau_curves(dict.fromkeys(LONG, CURVES["random"])),
    "trade_off, long": lambda: plots.trade_off(dict.fromkeys(LONG, [(0.1, 0.6)]), [(0.1, 0.05)], (0.03, 0.1)),
    "moved, long": lambda: plots.moved(
        dict.fromkeys(("adapter", "full"), dict.fromkeys([*LONG, "BD-VAX", "fine-tuning"], [(1, 0.9), (0, 0.95)])),
        "plain rows",
        "perturbed rows, as many steps",
    ),
    "cures, long": lambda: plots.cures(dict.fromkeys([*LONG, "conflict merge, linear"], [(0.01, 0.1, 0.0, 0.2)])),
    "overview, long": lambda: plots.overview({"adapter, sentiment": dict.fromkeys(LONG, BY_SEED["purified"])}),
    "arena, every row": lambda: plots.arena(
        {f"{name}, {i}": REPORTS["clean"] | {"utility_interval": None} for name in LONG for i in range(10)},
        {f"{name}, {i}": (list(DEMANDS)[i % len(DEMANDS)],) for name in LONG for i in range(10)},
    ),
    "score_heatmap, wide": lambda: plots.score_heatmap(np.eye(8, 512), "signature score of each MLP neuron"),
}
