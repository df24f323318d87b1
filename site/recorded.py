"""Sliders over recorded points: `recorded` writes one study into a page, as JSON and as a table.

No kernel and no fetching: the points stand in the page, and `static/sliders.js` moves among them. Without scripts the
table is what is left.
"""

import json
from html import escape

from docutils import nodes
from points import RESULTS, STUDIES, Point
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def table_of(letter: str, lines: dict[str, list[Point]]) -> str:
    """All points of a study as an HTML table."""
    cells = [
        f"<tr><td>{escape(name)}</td><td>{each['at']:g}</td><td>{each['asr']:.1f}</td><td>{each['utility']:.1f}</td></tr>"
        for name, points in lines.items()
        for each in points
    ]
    head = "".join(f'<th scope="col">{title}</th>' for title in ("method", letter, "ASR, %", "utility, %"))
    return f'<table class="table"><thead><tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table>'


def widget_of(name: str) -> str:
    """The slider of one study and its table, as HTML."""
    letter, study = STUDIES[name]
    lines = study()
    data = json.dumps({"letter": letter, "lines": lines}, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<div class="recorded" id="recorded-{name}">'
        f'<script type="application/json">{data}</script>'
        f'<div class="recorded-view"></div>'
        f"<details><summary>All recorded points</summary>{table_of(letter, lines)}</details></div>"
    )


class Recorded(SphinxDirective):
    """`{recorded} share`: the slider of one study."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        for path in RESULTS.glob("*.json"):
            self.env.note_dependency(str(path))
        return [nodes.raw("", widget_of(self.arguments[0]), format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("recorded", Recorded)
    app.add_js_file("sliders.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
