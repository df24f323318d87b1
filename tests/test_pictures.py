"""Pictures and tables as a notebook shows them: descriptions, captions, gaps, alignment, and markup made harmless."""

import base64
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from drawings import FIGURES
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from nbconvert import HTMLExporter

from helpers import plots


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_becomes_a_png_with_alternative_text(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and figure.axes
    picture = plots.image(figure, tmp_path / f"{name}.png", "What one sees", "How to read it.")
    written = (tmp_path / f"{name}.png").read_bytes()
    assert written.startswith(b"\x89PNG\r\n") and len(written) > 2000
    data, _ = InteractiveShell.instance().display_formatter.format(picture)
    assert data.keys() == {"text/plain", "text/html"}  # no bare picture, which has no place for either text
    assert data["text/plain"] == "Figure: What one sees\nHow to read it."


def test_saving_writes_what_it_returns(tmp_path):
    written = plots.save(FIGURES["defense_bars"](), tmp_path / "bars.png")
    assert written == (tmp_path / "bars.png").read_bytes() and written.startswith(b"\x89PNG\r\n")


class Page(HTMLParser):
    """The images of a page, and its text but for scripts and styles, in pieces with the tags around each."""

    def __init__(self, html):
        super().__init__()
        self.images, self.pieces, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "link", "input", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.pieces.append((self.open[-1] if self.open else "", text))


def test_an_exported_notebook_shows_the_picture_its_alternative_text_and_its_caption(tmp_path):
    alt, caption = """Bars for "clean" & 'other': ASR < 5 %""", "Lower is better; <b>read</b> with the table."
    picture = plots.image(FIGURES["defense_bars"](), tmp_path / "bars.png", alt, caption)
    data, metadata = InteractiveShell.instance().display_formatter.format(picture)
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data, metadata=metadata)])
    page = Page(HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0])
    (image,) = page.images
    assert image["alt"] == alt
    kind, _, encoded = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(encoded) == (tmp_path / "bars.png").read_bytes()
    assert "".join(text for tag, text in page.pieces if tag == "figcaption") == caption
    assert 'alt="Bars for &quot;clean&quot; &amp; ' in data["text/html"] and "ASR &lt; 5 %" in data["text/html"]


class Grid(HTMLParser):
    """The cells of a table, a list of (tag, classes, text) for each row, and its style sheet."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.style, self.in_style = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.in_style = tag == "style"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append((tag, dict(attributes)["class"].split(), ""))
        else:
            assert tag in ("style", "table", "thead", "tbody"), f"<{tag}> comes from a cell"

    def handle_data(self, text):
        if self.in_style:
            self.style += text
        elif self.rows and self.rows[-1] and text.strip():
            tag, classes, before = self.rows[-1][-1]
            self.rows[-1][-1] = (tag, classes, before + text)

    def texts(self, tag="td"):
        rows = ([text for kind, _, text in row if kind == tag] for row in self.rows)
        return [row for row in rows if row]

    def left(self):
        """The columns whose cells stand to the left."""
        rules = self.style.replace("\n", " ").split("}")
        aligned = [rule.split("{")[0] for rule in rules if "text-align: left" in rule]
        return {int(selector.rpartition(".col")[2]) for selector in aligned if ".col" in selector}


def grid(frame, **options):
    return Grid(plots.table(frame, **options).to_html())


def test_gaps_are_dashes_and_integers_have_no_decimals():
    frame = pd.DataFrame(
        {
            "rows": [1200, -3],
            "rate": [0.25, np.nan],
            "gap": [None, ""],
            "counted": pd.array([7, None], dtype="Int64"),
            "kept": [True, None],
        }
    )
    assert grid(frame).texts() == [["1,200", "0.2", "–", "7", "yes"], ["−3", "–", "–", "–", "–"]]
    assert grid(frame, digits=2).texts()[0][1] == "0.25"
    assert grid(frame, digits={"rate": 3}).texts()[0][1] == "0.250"


def test_numbers_have_a_true_minus_and_no_negative_zero():
    assert grid(pd.DataFrame({"a": [-1.5, -0.01, 12345.6]})).texts() == [["−1.5"], ["0.0"], ["12,345.6"]]


def test_text_stands_left_and_numbers_right():
    frame = pd.DataFrame({"a": ["x", None], "b": [1.0, np.nan], "c": [True, False], "d": [1, "2 of 3"], "e": [[1], []]})
    shown = grid(frame)
    assert shown.left() == {0, 2, 3, 4}
    assert "td {   text-align: right; }" in shown.style.replace("\n", " ")
    assert "row_heading {   text-align: left;" in shown.style.replace("\n", " ")


def test_markup_of_cells_labels_and_names_is_shown_and_not_obeyed():
    frame = pd.DataFrame(
        {"<b>c</b>": ["<script>x</script>", ["<i>", 'a"b']]}, index=pd.Index(["<u>r</u>", "&amp;"], name="<k>")
    )
    shown = grid(frame.rename_axis(columns="<n>"))  # the parser refuses any tag that is not the table's
    assert shown.texts() == [["<script>x</script>"], ['<i>, a"b']]
    heads = [text for row in shown.texts("th") for text in row]
    assert {"<b>c</b>", "<u>r</u>", "&amp;", "<k>", "<n>"} <= set(heads)


def test_the_same_table_is_the_same_html_and_another_is_not():
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    first, second, other = (plots.table(f).to_html() for f in (frame, frame.copy(), frame + 1))
    assert first == second and first.split(">")[1] != other.split(">")[1]
    assert plots.table(frame, digits=3).to_html() != first


def test_labels_that_are_numbers_or_missing_are_shown_as_names():
    frame = pd.DataFrame({0.30000000000000004: [1, 2, 3], None: [4, 5, 6]}, index=[0.1 + 0.2, np.nan, 2048])
    heads = [text.strip() for row in grid(frame).texts("th") for text in row]
    assert heads[1:] == ["0.3", "–", "0.3", "–", "2048"]


def test_several_levels_on_both_axes():
    rows = pd.MultiIndex.from_tuples([("adapter", 0.1), ("adapter", np.nan), ("full", 0.1)], names=["access", "<τ>"])
    columns = pd.MultiIndex.from_product([["BadNets", "VPI"], ["ASR %", "<note>"]])
    frame = pd.DataFrame([[1.5, "a", 2.5, "b"]] * 3, rows, columns)
    shown = grid(frame)
    assert shown.texts() == [["1.5", "a", "2.5", "b"]] * 3
    heads = [text for row in shown.texts("th") for text in row if text.strip()]
    assert heads == [
        *("BadNets", "VPI", "ASR %", "<note>", "ASR %", "<note>", "access", "<τ>"),
        *("adapter", "0.1", "–", "full", "0.1"),
    ]
    assert {1, 3} <= shown.left() and grid(frame, digits={("VPI", "ASR %"): 2}).texts()[0] == ["1.5", "a", "2.50", "b"]


def test_names_may_be_there_twice():
    frame = pd.DataFrame([[1.5, "x"], [2.5, "y"]], index=["seed", "seed"], columns=["a", "a"])
    shown = grid(frame)
    assert shown.texts() == [["1.5", "x"], ["2.5", "y"]] and shown.left() == {1}


def test_without_labels_only_the_cells_are_shown():
    assert grid(pd.DataFrame({"a": [1]}, index=["label"]), index=False).texts("th") == [["a"]]
    assert grid(pd.DataFrame({"a": []})).texts() == []
