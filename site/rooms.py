"""The API pages: one for each room of `helpers/`, made from the docstrings of its modules."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.autodoc import Options

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "site" / "api"
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")  # code, as Markdown writes it
SPECIAL = re.compile(r"(\*|\||(?<=\w)_(?=\W|$))")  # what reStructuredText would read as markup


def rooms() -> list[str]:
    """The names of the rooms, sorted."""
    return sorted(path.parent.name for path in (ROOT / "helpers").glob("*/__init__.py"))


def modules(room: str) -> list[str]:
    """The dotted names of a room and its modules, the room first."""
    paths = sorted((ROOT / "helpers" / room).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__main__"]
    return sorted(name.removesuffix(".__init__") for name in names)


def heading(text: str, underline: str) -> str:
    return f"{text}\n{underline * len(text)}\n"


def page_of(room: str) -> str:
    """The page of one room, in reStructuredText."""
    parts = [heading(f"helpers.{room}", "=")]
    for module in modules(room):
        parts += [heading(module, "-"), f".. automodule:: {module}\n   :ignore-module-all:\n"]
    return "\n".join(parts)


def write_pages(app: Sphinx) -> None:
    """Write the pages that changed and remove those of rooms that are gone."""
    PAGES.mkdir(exist_ok=True)
    for stale in {path.stem for path in PAGES.glob("*.rst")} - set(rooms()):
        (PAGES / f"{stale}.rst").unlink()
    for room in rooms():
        path, text = PAGES / f"{room}.rst", page_of(room)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def escape(line: str) -> str:
    """One line of a docstring so that reStructuredText shows it as it stands, `code` as code."""
    pieces = CODE.split(line)
    pieces[::2] = [SPECIAL.sub(r"\\\1", piece) for piece in pieces[::2]]
    pieces[1::2] = [f"``{piece}``" for piece in pieces[1::2]]
    return "".join(pieces)


def mark_code(lines: list[str]) -> list[str]:
    """A module's docstring, its indented blocks marked as code and the rest escaped."""
    marked, before = [], ""
    for line in lines:
        indented = line.startswith("    ")
        if indented and not before.startswith("    "):
            marked += ["::", ""]
        marked.append(line if indented else escape(line))
        before = line if line.strip() else before
    return marked


def escape_docstring(app: Sphinx, what: str, name: str, obj: object, options: Options, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in it; this runs before their sections are read."""
    lines[:] = mark_code(lines) if what == "module" else [escape(line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
