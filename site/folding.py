"""What a page folds: the set-up of a lesson, what is optional in it, and the solutions of the exercises.

The files of the repository stay as they are; a page is changed while Sphinx reads it.
"""

import re

import nbformat
from sphinx.application import Sphinx

from course.colab import ID as COLAB

FOLD = "hide-input"  # MyST-NB puts the code of such a cell behind a click
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DIAGRAM = r"<details><summary>The diagram as text; GitHub draws it</summary>\n\n```text\n\1```\n\n</details>"
DISCUSSION = "**Discussion.**"


def is_set_up(number: int, cell: nbformat.NotebookNode, parameters: int) -> bool:
    """Whether a cell of a lesson imports, sets parameters or opens the run: all up to the cell after the parameters."""
    return cell.cell_type == "code" and number <= parameters + 1


def fold(cell: nbformat.NotebookNode, prompt: str) -> None:
    """Put a cell's code behind a click on `prompt`; its output stays."""
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), FOLD]
    cell.metadata["mystnb"] = {"code_prompt_show": prompt}


def remove_colab(notebook: nbformat.NotebookNode) -> None:
    """Leave out the cell that fetches the lab on Google Colab: a page runs nothing."""
    notebook.cells = [cell for cell in notebook.cells if cell.id != COLAB]


def fold_lesson(notebook: nbformat.NotebookNode) -> None:
    """Fold the set-up and the optional cells of a lesson."""
    remove_colab(notebook)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    parameters = next(number for number, named in enumerate(tags) if "parameters" in named)
    for number, cell in enumerate(notebook.cells):
        if is_set_up(number, cell, parameters):
            fold(cell, "Show the set-up")
        elif "optional" in tags[number] and cell.cell_type == "code":
            fold(cell, "Show the code of this optional step")


def fold_solutions(notebook: nbformat.NotebookNode) -> None:
    """Fold each solution and its discussion; the tasks stay visible."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and "check(" not in cell.source and "def " in cell.source:
            fold(cell, "Show the solution")
        elif cell.source.startswith(DISCUSSION):
            text = cell.source.removeprefix(DISCUSSION).strip()
            cell.source = f"<details><summary>Show the discussion</summary>\n\n{text}\n\n</details>"


def name_diagrams(text: str) -> str:
    """Show a Mermaid diagram as its text: drawing it takes a library of three megabytes that comes from the network."""
    return MERMAID.sub(DIAGRAM, text)


def change_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of one page before it is parsed."""
    folder = name.rpartition("/")[0]
    change = {"notebooks": fold_lesson, "course/sheets": remove_colab, "course/solutions": fold_solutions}.get(folder)
    if change:
        notebook = nbformat.reads(source[0], as_version=4)
        change(notebook)
        source[0] = nbformat.writes(notebook)
    elif folder == "docs":
        source[0] = name_diagrams(source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", change_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
