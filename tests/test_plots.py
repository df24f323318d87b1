"""Figures: each draws the numbers it was given, and names what it draws."""

import inspect
import pkgutil
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from drawings import BY_SEED, FIGURES, SWEPT
from matplotlib.container import BarContainer

from helpers import plots


def widths(axes):
    """Lengths of the horizontal bars, one list per color."""
    return [[bar.get_width() for bar in bars] for bars in axes.containers if isinstance(bars, BarContainer)]


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def figures():
    """The functions that draw, {name: function}, from the files of the package."""
    files = [import_module(f"{plots.__name__}.{file.name}") for file in pkgutil.iter_modules(plots.__path__)]
    found = [(name, f) for file in files for name, f in inspect.getmembers(file, inspect.isfunction)]
    drawing = {name: f for name, f in found if inspect.signature(f).return_annotation == "Figure"}
    return {name: f for name, f in drawing.items() if not name.startswith("_")}


def test_every_figure_of_the_package_is_offered_and_tried_here():
    assert figures().keys() == FIGURES.keys() == set(plots.__all__) - {"image", "results", "save", "table"}
    assert all(getattr(plots, name) is figure for name, figure in figures().items())


DIAGRAMS = {"one_pass", "bdvax_diagram", "conflict_diagram"}  # without axes


@pytest.mark.parametrize("name", sorted(FIGURES.keys() - DIAGRAMS))
def test_every_axis_says_what_it_shows(name):
    for axes in FIGURES[name]().axes:
        assert axes.get_xlabel() or axes.get_ylabel()


def test_families_are_sorted_and_the_mean_is_marked():
    (axes,) = FIGURES["family_bars"]().axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["tone", "year", "list"]
    assert widths(axes) == [[50, 90, 100]]
    assert curves(axes) == {"mean 80.0 %": [[80, 0], [80, 1]]}


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
        assert len({line.get_marker() for line in axes.get_lines()}) == 3  # readable without colors


def test_twins_stand_side_by_side():
    (axes,) = FIGURES["variant_bars"]().axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[90, 80], [0, 10]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["RedGhost", "IronHawk"]


def test_the_heat_map_shows_where_channels_sit_and_beside_it_how_many_stand_out():
    placed, ordered, _ = FIGURES["score_heatmap"]().axes
    assert placed.images[0].get_array().tolist() == [[1, 3, 2], [6, 4, 5]]
    assert ordered.images[0].get_array().tolist() == [[3, 2, 1], [6, 5, 4]]
    assert placed.images[0].get_clim() == ordered.images[0].get_clim() == (1, 6)


def test_the_scatter_compares_ranks():
    (axes,) = FIGURES["rank_scatter"]().axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[0, 0], [0.5, 1], [1, 0.5]]


def test_channels_of_one_score_have_one_rank():
    (axes,) = plots.rank_scatter([5.0, 5.0, 1.0], [3.0, 2.0, 1.0], "layer 1").axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[1, 0.75], [0.5, 0.75], [0, 0]]


def test_bars_tell_their_values():
    left, right = FIGURES["defense_bars"]().axes
    assert [text.get_text() for text in left.texts] == ["0.0", "95.0"]
    assert [text.get_text() for text in right.texts] == ["97.0", "96.0"]
    assert right.get_xlabel() == "utility, higher is better, %\n(axis from 90 to 100)"
    ends = [text.xy[0] for text in left.texts]
    assert ends == pytest.approx([2, 97])  # behind the intervals
    (axes,) = FIGURES["family_bars"]().axes
    assert [text.get_text() for text in axes.texts] == ["50.0", "90.0", "100.0"]
    (axes,) = FIGURES["variant_bars"]().axes
    assert [text.get_text() for text in axes.texts] == ["90.0", "80.0", "0.0", "10.0"]
    (axes,) = FIGURES["label_bars"]().axes
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["90.0", "ASR 0.0", "ASR 95.0"]
    left, right = plots.overview({"adapter": BY_SEED}).axes
    assert [text.get_text() for text in left.texts] == ["95.0", "5.0"]
    assert [text.get_text() for text in right.texts] == ["95.0", "80.0"]


def test_attack_and_utility_stand_side_by_side():
    left, right = FIGURES["defense_bars"]().axes
    assert widths(left) == [pytest.approx([0, 95])] and widths(right) == [pytest.approx([97, 96])]
    assert left.yaxis_inverted() and right.yaxis_inverted()


def drawn(axes):
    return {name: np.round(points, 9).tolist() for name, points in curves(axes).items()}


def test_tau_curves_hold_both_measures_of_each_ranking():
    attack, useful = FIGURES["tau_curves"]().axes
    assert drawn(attack) == {"signature": [[25, 50], [50, 10]], "random": [[25, 90], [50, 60]]}
    assert drawn(useful) == {"signature": [[25, 90], [50, 80]], "random": [[25, 70], [50, 40]]}
    assert attack.get_ylabel() == "ASR, lower is better, %" and useful.get_ylabel() == "utility, higher is better, %"


def test_the_share_curve_holds_both_measures():
    attack, useful = FIGURES["share_curve"]().axes
    assert drawn(attack) == {"merge": [[0, 90], [0.7, 10]]} and drawn(useful) == {"merge": [[0, 80], [0.7, 75]]}


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
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([1.5, 7.5])  # the mean of two seeds, in percent
    assert axes.collections[0].get_datalim(axes.transData).extents[3] == pytest.approx(10)  # the higher seed


def test_readers_see_plain_names_in_place_of_keys():
    merges = pd.DataFrame({"model": "conflict", "error": "", "conflict.t": 0.5, "by": ["ties", "mine"], "asr": 0.1})
    figure = plots.sweep(merges, "conflict.t", by="by", model="conflict", xlabel="share t", legend="merge")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mine", "TIES"]
    assert legend.get_title().get_text() == "merge" and figure.axes[0].get_xlabel() == "share t"
    assert plots.sweep(merges, "conflict.t", model="conflict").axes[0].get_xlabel() == "share"
    squares = pd.DataFrame({"badnets": [0.1], "other": [0.2]}, index=["sentiment, full"])
    axes, _ = plots.matrix(squares, "attack", "task").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["BadNets", "other"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["insult, full access"]
    left, _ = plots.overview({"adapter, sentiment": BY_SEED}).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["backdoored", "BD-VAX"]
    assert left.get_title(loc="left") == "adapter access, insult"


def test_what_is_moved_goes_from_a_hollow_point_to_a_full_one():
    left, right = FIGURES["moved"]().axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["adapter access", "full access"]
    line, before, after, *_ = left.get_lines()
    assert line.get_xydata().tolist() == [[30, 90], [10, 95]]
    assert before.get_xydata().tolist() == [[30, 90]] and before.get_markerfacecolor() == "white"
    assert after.get_xydata().tolist() == [[10, 95]] and after.get_markerfacecolor() == line.get_color()
    handles, names = left.get_legend_handles_labels()
    assert names == ["signature", "none", "plain rows", "perturbed rows"]
    assert handles[2].get_markerfacecolor() == "white" != handles[3].get_markerfacecolor()


def test_a_trade_off_joins_each_cure_and_shades_what_would_be_good_enough():
    (axes,) = FIGURES["trade_off"]().axes
    assert drawn(axes) == {"signature": [[1, 60], [5, 20]], "random": [[2, 90]], "other settings": [[10, 5], [0, 80]]}
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "-", "None"]
    (box,) = axes.patches
    corner = axes.transData.inverted().transform(box.get_window_extent().get_points()[1])
    assert corner.tolist() == pytest.approx([3, 10])


def test_each_cure_has_its_points_and_the_interval_of_each():
    (axes,) = FIGURES["cures"]().axes
    cured = {bars.get_label(): bars.lines for bars in axes.containers}
    points = {name: np.round(data.get_xydata(), 9).tolist() for name, (data, _, _) in cured.items()}
    assert points == {"signature": [[-1, 10], [2, 0]], "none": [[0, 100]]}
    ranges = {
        name: [np.round(s[:, 1], 9).tolist() for s in bars.get_segments()] for name, (*_, (bars,)) in cured.items()
    }
    assert ranges == {"signature": [[5, 20], [0, 10]], "none": [[90, 100]]}
    assert len({(data.get_color(), data.get_marker()) for data, *_ in cured.values()}) == 2


def test_the_squares_of_a_matrix_tell_their_numbers_and_leave_gaps_empty():
    axes, _ = FIGURES["matrix"]().axes
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "90.0", (0, 1): "10.0", (1, 1): "60.0"}  # (column, row)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["insults", "mixed"]


def test_the_sketch_of_one_pass_has_a_part_for_each_adapter():
    left, right = plots.one_pass(4).axes
    assert (len(left.patches), len(right.patches)) == (3 * 4, 2 * 4 + 1)


def words(axes):
    return " ".join(text.get_text() for text in axes.texts)


def test_the_diagrams_name_every_step_of_their_method():
    (axes,) = plots.bdvax_diagram().axes
    steps = ("suspicious", "vaccine", "clean twin", "Delta", "Eq. 2", "suppress", "recovery fine-tuning", "purified")
    assert [step for step in steps if step not in words(axes)] == []
    (axes,) = plots.conflict_diagram().axes
    steps = ("clean base", "clean rows", "conflict model", "suspicious", "merge", "evidence", "prompt", "merged model")
    assert [step for step in steps if step not in words(axes)] == []


def test_who_knows_what_is_written_in_a_grid():
    table = pd.DataFrame({"attacker": ["yes", "no"], "defender": ["no", "if told"]}, index=["key", "vaccines"])
    (axes,) = plots.who_knows(table).axes
    assert [text.get_text() for text in axes.texts] == ["yes", "no", "no", "if told"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attacker", "defender"]
    faces = [patch.get_facecolor() for patch in axes.patches]
    assert faces[1] == faces[2] and len(set(faces)) == 3
