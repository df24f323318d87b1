"""How figures look: contrast, colors for the color-blind, axes that show the data, and nothing hidden or cut off."""

import functools
from itertools import combinations

import numpy as np
import pytest
from drawings import CROWDED, FIGURES
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from helpers.plots import style


@functools.cache
def laid_out(name):
    """A figure whose parts have their places."""
    figure = (FIGURES | CROWDED)[name]()
    figure.draw_without_rendering()
    return figure


def luminance(color):
    """By WCAG 2.2, of a color "#RRGGBB"."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


SEEN_WITHOUT = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)
TO_XYZ = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]])  # white is 1, 1, 1


def apart(first, second):
    """The least distance of two colors in CIELAB as the color-blind see them."""

    def lab(color, seen):
        parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        x, y, z = np.cbrt(TO_XYZ @ np.clip(seen @ linear, 0, 1))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return min(np.linalg.norm(lab(first, seen) - lab(second, seen)) for seen in map(np.array, SEEN_WITHOUT))


def ratio(first, second):
    low, high = sorted(luminance(to_hex(color)) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_of_two_colours_is_that_of_the_standard():
    assert style.contrast("black", "white") == pytest.approx(21) and style.contrast(style.RED, style.RED) == 1
    assert style.contrast("#777777", "white") == pytest.approx(4.48, abs=0.01)  # as the standard's own examples give it
    assert style.contrast(style.BLUE, style.GREY) == pytest.approx(ratio(style.BLUE, style.GREY))


COLORS = ("BLUE", "ORANGE", "GREEN", "RED", "PURPLE", "SKY", "GREY")


@pytest.mark.parametrize("name", COLORS)
def test_every_colour_stands_out_from_the_page_and_from_what_is_drawn_on_it(name):
    color = getattr(style, name)
    assert ratio(color, "white") >= 3
    assert ratio(color, "black") >= 3  # dots and intervals on bars
    assert ratio(color, style.ink_on(color)) >= 4.5  # words on bars


def test_no_two_colours_are_the_same_for_colour_blind_readers():
    """Distances in CIELAB as seen without red, green or blue cones (matrices of Machado et al., 2009)."""
    assert min(apart(*pair) for pair in combinations([getattr(style, name) for name in COLORS], 2)) >= 6


@pytest.mark.parametrize("name", FIGURES)
def test_lines_markers_and_bars_stand_out(name):
    for axes in laid_out(name).axes:
        for line in axes.get_lines():
            assert line.get_alpha() in (None, 1) and ratio(line.get_color(), "white") >= 3
        for patch in axes.patches:
            assert patch.get_alpha() in (None, 1)
            assert max(ratio(color, "white") for color in (patch.get_facecolor(), patch.get_edgecolor())) >= 3


@pytest.mark.parametrize("name", FIGURES)
def test_words_can_be_read_on_what_is_below_them(name):
    figure = laid_out(name)
    for axes in figure.axes:
        for text in filter(lambda text: text.get_text(), axes.texts):
            assert ratio(text.get_color(), below(text, axes)) >= 4.5, text.get_text()


def below(text, axes):
    """The color of the square or the last bar or box under the middle of a text."""
    middle = text.get_window_extent().get_points().mean(axis=0)
    for picture in axes.images:
        column, row = np.round(axes.transData.inverted().transform(middle)).astype(int)
        return picture.cmap(picture.norm(picture.get_array()[row, column]))
    under = [patch.get_facecolor() for patch in axes.patches if patch.get_window_extent().contains(*middle)]
    return under[-1] if under else "white"


@pytest.mark.parametrize("name", FIGURES)
def test_no_legend_hides_the_data(name):
    figure = laid_out(name)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert not any(legend.get_window_extent().overlaps(box) for legend in figure.legends for box in boxes)


@pytest.mark.parametrize("name", FIGURES | CROWDED)
def test_nothing_is_cut_off_at_the_border(name):
    figure = laid_out(name)
    tight, page = figure.get_tightbbox(), figure.get_size_inches()
    assert tight.x0 > -0.02 and tight.y0 > -0.02 and tight.x1 < page[0] + 0.02 and tight.y1 < page[1] + 0.02


def axis_of(rates, **options):
    axes = Figure().subplots()
    style.rate_axis(axes, "x", "rate", rates, **options)
    return axes.get_xlabel(), [float(tick) for tick in axes.get_xticks()]


def test_an_axis_of_rates_ends_where_the_data_do_and_says_so():
    assert axis_of([0, 60]) == ("rate, %", [0, 20, 40, 60, 80, 100])
    assert axis_of([0, 15]) == ("rate, %\n(axis from 0 to 20)", [0, 5, 10, 15, 20])
    assert axis_of([0, 0]) == ("rate, %\n(axis from 0 to 5)", [0, 1, 2, 3, 4, 5])
    assert axis_of([96, 97], zoom=True) == ("rate, %\n(axis from 90 to 100)", [90, 92, 94, 96, 98, 100])
    assert axis_of([40, 97], zoom=True) == axis_of([96, 97]) == ("rate, %", [0, 20, 40, 60, 80, 100])
    assert axis_of([np.nan, 15]) == axis_of([15]) and axis_of([]) == axis_of([100])  # what was not measured
    axes = Figure().subplots()
    style.rate_axis(axes, "y", "rate", [81, 100], zoom=True)
    assert axes.get_ylabel() == "rate, %\n(axis from 80 to 100)"
    assert axes.get_ylim()[0] < 81 and axes.get_ylim()[1] > 100


@pytest.mark.parametrize("name", ["bdvax_diagram", "conflict_diagram", "one_pass"])
def test_words_fit_into_their_boxes(name):
    figure = laid_out(name)
    for axes in figure.axes:
        boxes = [patch.get_window_extent() for patch in axes.patches]
        for text in axes.texts:
            extent = text.get_window_extent()
            inside = [box for box in boxes if box.contains(*extent.get_points().mean(axis=0))]
            assert all(box.x0 <= extent.x0 and extent.x1 <= box.x1 for box in inside), text.get_text()
            assert all(box.y0 <= extent.y0 and extent.y1 <= box.y1 for box in inside), text.get_text()
