"""`make slides`: one deck for each of the three sessions, as a page that opens by a double click and asks for nothing.

A deck is a Markdown file in `slides/`, cut at lines of three dashes. A line that is a link to a cell of a notebook,
`[figure](../../notebooks/05_suppress_channels.ipynb#05-18)`, becomes the picture that is stored there, with its
description and its caption; `$$…$$` on a line of its own becomes a formula; what follows a line `Note:` is for whoever
speaks. Style and keys stand in `slides/deck.html.j2`, inside the page.
"""

import base64
import functools
import io
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import jinja2
import mistune
import nbformat
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties

from helpers.core.errors import LabError, exit_status
from helpers.core.paths import ROOT

SOURCES = Path(__file__).parent / "slides"
BUILT = ROOT / "site" / "_build" / "slides"
CUT = re.compile(r"^---$", re.MULTILINE)
FIGURE = re.compile(r"^\[figure\]\((?P<notebook>[^)#]+\.ipynb)#(?P<cell>[\w-]+)\)$", re.MULTILINE)
FORMULA = re.compile(r"^\$\$(?P<tex>.+)\$\$ *(?P<spoken>\(.+\))$", re.MULTILINE)
NOTE = re.compile(r"^Note:\s*", re.MULTILINE)
PICTURE = re.compile(r"<figure>.*?</figure>", re.DOTALL)
FORMULA_SIZE = 20  # points; the page scales a formula by its width in points, as it does its text
WIDTH = re.compile(r'<svg[^>]* width="([\d.]+)pt"')


def build(source: Path, folder: Path = BUILT) -> Path:
    """Write a deck.

    Args:
        source: its Markdown.
        folder: made on demand.

    Returns:
        the page.

    Raises:
        LabError: a figure's notebook or cell is not there, or that cell shows no picture.
    """
    text = source.read_text(encoding="utf-8")
    slides = [slide_of(part, source) for part in CUT.split(text)]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(SOURCES), autoescape=True, trim_blocks=True)
    title = text.partition("\n")[0].removeprefix("# ")
    page = environment.get_template("deck.html.j2").render(title=title, slides=slides)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.html"
    target.write_text(page, encoding="utf-8")
    return target


def slide_of(text: str, source: Path) -> dict[str, str]:
    """One slide as HTML.

    Args:
        text: its Markdown.
        source: of the deck, from which its links count.

    Returns:
        {"body": what is shown, "note": what is said}; the note may be "".

    Raises:
        LabError: as `build`.
    """
    body, *note = NOTE.split(text, maxsplit=1)
    body = FIGURE.sub(lambda found: stored_picture(source.parent / found["notebook"], found["cell"]), body)
    body = FORMULA.sub(lambda found: formula(found["tex"], found["spoken"].strip("()")), body)
    return {"body": _html(body), "note": _html("".join(note))}


_html = mistune.create_markdown(escape=False, plugins=["table"])


@functools.cache
def _cells(notebook: Path) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in nbformat.read(notebook, as_version=4).cells}


def stored_picture(notebook: Path, cell: str) -> str:
    """The figure that a cell of a notebook shows, as HTML with its description, its caption and where it is from.

    Args:
        notebook: its path.
        cell: the id of the cell.

    Raises:
        LabError: there is no such notebook or cell, or it shows no picture.
    """
    if not notebook.is_file():
        raise LabError(f"a slide shows a figure of {notebook.name}, which is not there")
    outputs = _cells(notebook.resolve()).get(cell, {}).get("outputs", [])
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    if not (picture := PICTURE.search(shown)):
        raise LabError(f"cell '{cell}' of {notebook.name} shows no picture: a slide wants one, see its stored outputs")
    origin = f'<span class="origin">as stored in notebook {notebook.name[:2]}</span></figcaption>'
    return picture[0].replace("</figcaption>", origin)


@functools.cache
def formula(tex: str, spoken: str) -> str:
    """A formula as an inline picture, drawn by Matplotlib.

    Args:
        tex: in the part of TeX that Matplotlib knows.
        spoken: the formula in words, for whoever cannot see it.
    """
    buffer = io.BytesIO()
    mathtext.math_to_image(f"${tex}$", buffer, format="svg", prop=FontProperties(size=FORMULA_SIZE))
    points = WIDTH.search(buffer.getvalue().decode("utf-8"))[1]
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(spoken)}" style="--points: {points}">'
    return f'<p class="formula">{image}</p>'


def build_all(sources: Sequence[Path] = ()) -> None:
    """Write every deck and say where."""
    for source in sources or sorted(SOURCES.glob("*.md")):
        print(build(source).relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(exit_status(build_all))
