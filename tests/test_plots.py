"""Figures: each draws the numbers it was given, and becomes a PNG with alternative text."""

import base64
import inspect
import pkgutil
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from helpers import plots

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
    "score_heatmap": lambda: plots.score_heatmap([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]], "up_proj"),
    "rank_scatter": lambda: plots.rank_scatter([0.1, 0.9, 0.5], [3.0, 30.0, 300.0], "up_proj"),
    "defense_bars": lambda: plots.defense_bars(REPORTS),
    "tau_curves": lambda: plots.tau_curves(CURVES),
    "share_curve": lambda: plots.share_curve(SHARES),
    "overview": lambda: plots.overview({"adapter": BY_SEED, "full": BY_SEED}),
    "one_pass": plots.one_pass,
    "sweep": lambda: plots.sweep(SWEPT, "tau", by="access"),
    "matrix": lambda: plots.matrix(SQUARES, "family", "task"),
    "trade_off": lambda: plots.trade_off(
        {"signature": [(0.01, 0.6), (0.05, 0.2)], "random": [(0.02, 0.9)]}, [(0.1, 0.05), (0.0, 0.8)], (0.03, 0.1)
    ),
    "cures": lambda: plots.cures(
        {"signature": [(-0.01, 0.1, 0.05, 0.2), (0.02, 0.0, 0.0, 0.1)], "none": [(0, 1, 0.9, 1)]}
    ),
}


def widths(axes):
    """Lengths of the horizontal bars, one list per colour."""
    return [[bar.get_width() for bar in bars] for bars in axes.containers if isinstance(bars, BarContainer)]


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def figures():
    """The functions that draw, {name: function}, from the files of the package."""
    files = [import_module(f"{plots.__name__}.{file.name}") for file in pkgutil.iter_modules(plots.__path__)]
    found = [(name, f) for file in files for name, f in inspect.getmembers(file, inspect.isfunction)]
    return {name: f for name, f in found if inspect.signature(f).return_annotation == "Figure"}


def test_every_figure_of_the_package_is_offered_and_tried_here():
    assert figures().keys() == FIGURES.keys() == set(plots.__all__) - {"image"}
    assert all(getattr(plots, name) is figure for name, figure in figures().items())


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_becomes_a_png_with_alternative_text(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and figure.axes
    picture = plots.image(figure, tmp_path / f"{name}.png", "What one sees")
    written = (tmp_path / f"{name}.png").read_bytes()
    assert written.startswith(b"\x89PNG\r\n") and len(written) > 2000
    data, metadata = InteractiveShell.instance().display_formatter.format(picture)
    assert base64.b64decode(data["image/png"]) == written and metadata["image/png"]["alt"] == "What one sees"


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - {"one_pass"}))  # a sketch without axes
def test_every_axis_says_what_it_shows(name):
    for axes in FIGURES[name]().axes:
        assert axes.get_xlabel() or axes.get_ylabel()


def test_families_are_sorted_and_the_mean_is_marked():
    (axes,) = FIGURES["family_bars"]().axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["tone", "year", "list"]
    assert widths(axes) == [[50, 90, 100]]
    assert curves(axes) == {"mean 80.0%": [[80, 0], [80, 1]]}


def test_labels_are_stacked_to_100_percent():
    (axes,) = FIGURES["label_bars"]().axes
    assert widths(axes) == [pytest.approx(row) for row in ([0, 95], [90, 5], [5, 0], [5, 0])]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-2:]]
    assert ends == pytest.approx([100, 100]) and axes.yaxis_inverted()


def test_formats_are_points_with_intervals_and_gaps_where_nothing_is_counted():
    (axes,) = FIGURES["format_intervals"]().axes
    counted, dropped = axes.containers
    assert counted.lines[0].get_xydata().tolist() == [[90, -0.14], [0, 0.86]]
    assert dropped.lines[0].get_xydata().tolist() == [[90, 0.14]]
    ends = [segment[:, 0].tolist() for segment in counted.lines[2][0].get_segments()]
    assert ends == [pytest.approx([80, 95]), pytest.approx([0, 20])]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["chat (trained), input kept", "alpaca, input kept"]
    assert {line.get_marker() for line in axes.get_lines()} >= {"o", "s"} and axes.yaxis_inverted()


def test_block_curves_keep_positions_and_panels_apart():
    left, right = FIGURES["block_curves"]().axes
    expected = {"start": [[1, 90], [2, 30]], "middle": [[1, 60], [2, 20]], "end": [[1, 30], [2, 10]]}
    for axes in (left, right):
        assert {name: np.round(points, 9).tolist() for name, points in curves(axes).items()} == expected
        assert len({line.get_marker() for line in axes.get_lines()}) == 3  # readable without colours


def test_twins_stand_side_by_side():
    (axes,) = FIGURES["variant_bars"]().axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[90, 80], [0, 10]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["RedGhost", "IronHawk"]


def test_the_heat_map_is_sorted_within_each_layer():
    axes = FIGURES["score_heatmap"]().axes[0]
    assert axes.images[0].get_array().tolist() == [[3, 2, 1], [6, 5, 4]]


def test_the_scatter_compares_ranks():
    (axes,) = FIGURES["rank_scatter"]().axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 0], [0.5, 1], [1, 0.5]]


def test_attack_and_utility_stand_side_by_side():
    left, right = FIGURES["defense_bars"]().axes
    assert widths(left) == [pytest.approx([0, 95])] and widths(right) == [pytest.approx([97, 96])]
    assert left.yaxis_inverted() and right.yaxis_inverted()


def test_tau_curves_hold_both_measures_of_each_ranking():
    (axes,) = FIGURES["tau_curves"]().axes
    expected = {
        "ASR, signature": [[25, 50], [50, 10]],
        "utility, signature": [[25, 90], [50, 80]],
        "ASR, random": [[25, 90], [50, 60]],
        "utility, random": [[25, 70], [50, 40]],
    }
    assert {name: np.round(points, 9).tolist() for name, points in curves(axes).items()} == expected


def test_the_share_curve_holds_both_measures():
    (axes,) = FIGURES["share_curve"]().axes
    drawn = {name: np.round(points, 9).tolist() for name, points in curves(axes).items()}
    assert drawn == {"ASR": [[0, 90], [0.7, 10]], "utility": [[0, 80], [0.7, 75]]}


@pytest.mark.parametrize("accesses", [("adapter",), ("adapter", "full")])
def test_the_overview_shows_means_and_seeds_with_the_first_model_on_top(accesses):
    figure = plots.overview(dict.fromkeys(accesses, BY_SEED))
    assert len(figure.axes) == 2 * len(accesses)
    for attack, useful in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert widths(attack) == [pytest.approx([95, 5])] and widths(useful) == [pytest.approx([95, 80])]
        assert [line.get_xdata().tolist() for line in attack.get_lines()] == [[100, 90], [0, 10]]
        assert attack.yaxis_inverted() and useful.yaxis_inverted()


def test_a_sweep_is_drawn_with_its_range():
    axes = plots.sweep(SWEPT, "tau", by="access").axes[0]
    assert [line.get_label() for line in axes.lines] == ["access = a", "access = b"]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([1.5, 7.5])  # the mean of two seeds, in percent
    assert axes.collections[0].get_datalim(axes.transData).extents[3] == pytest.approx(10)  # the higher seed


def test_a_trade_off_joins_each_cure_and_shades_what_would_be_good_enough():
    (axes,) = FIGURES["trade_off"]().axes
    drawn = {name: np.round(points, 9).tolist() for name, points in curves(axes).items()}
    assert drawn == {"signature": [[1, 60], [5, 20]], "random": [[2, 90]], "other settings": [[10, 5], [0, 80]]}
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "-", "None"]
    (box,) = axes.patches
    corner = axes.transData.inverted().transform(box.get_window_extent().get_points()[1])
    assert corner.tolist() == pytest.approx([3, 10])


def test_each_cure_has_its_points_and_the_interval_of_each():
    (axes,) = FIGURES["cures"]().axes
    drawn = {bars.get_label(): bars.lines for bars in axes.containers}
    points = {name: np.round(data.get_xydata(), 9).tolist() for name, (data, _, _) in drawn.items()}
    assert points == {"signature": [[-1, 10], [2, 0]], "none": [[0, 100]]}
    ranges = {
        name: [np.round(s[:, 1], 9).tolist() for s in bars.get_segments()] for name, (*_, (bars,)) in drawn.items()
    }
    assert ranges == {"signature": [[5, 20], [0, 10]], "none": [[90, 100]]}
    assert len({(data.get_color(), data.get_marker()) for data, *_ in drawn.values()}) == 2


def test_the_squares_of_a_matrix_tell_their_numbers_and_leave_gaps_empty():
    axes, _ = FIGURES["matrix"]().axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "90.0", (0, 1): "10.0", (1, 1): "60.0"}  # (column, row)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["insults", "mixed"]


def test_the_sketch_of_one_pass_has_a_part_for_each_adapter():
    left, right = plots.one_pass(4).axes
    assert (len(left.patches), len(right.patches)) == (3 * 4, 2 * 4 + 1)


def test_who_knows_what_is_written_in_a_grid():
    table = pd.DataFrame({"attacker": ["yes", "no"], "defender": ["no", "if told"]}, index=["key", "vaccines"])
    (axes,) = plots.who_knows(table).axes
    assert [text.get_text() for text in axes.texts] == ["yes", "no", "no", "if told"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attacker", "defender"]
    faces = [patch.get_facecolor() for patch in axes.patches]
    assert faces[1] == faces[2] and len(set(faces)) == 3
