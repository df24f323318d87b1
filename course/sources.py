"""A lesson's exercises as a file in Jupytext's percent format, and the two notebooks that are made of it.

A cell begins with `# %%`, a text cell with `# %% [markdown]`, and `tags=["…"]` says what it is for:

- no tag: in the sheet and in the solutions; what stands from BEGIN SOLUTION to END SOLUTION is cut from the sheet.
- `hint`: folded away, in the sheet alone.
- `discussion`: in the solutions alone.
- `hidden`: in neither: cases, oracles and typical wrong answers.

Below the cell that defines an exercise's function both notebooks get the cell that checks it.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.colab import known_address, put_cell
from helpers.core.paths import ROOT

MARK = re.compile(r"^# %%(?P<text> \[markdown\])?(?: tags=\[(?P<tags>.*)\])?$")
SOLVED = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n?", re.DOTALL | re.MULTILINE)
BORDER = re.compile(r"^ *### (?:BEGIN|END) SOLUTION\n?", re.MULTILINE)
STUB = "raise NotImplementedError  # your code, instead of this line"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
HOW = """
Each task asks for one function. Write it in place of the line `raise NotImplementedError`, run the cell, then the one \
below: `check` draws fresh cases and says *not done yet*, *6 of 6*, or which case fails and what is likely wrong. \
`check(…, seed=1)` asks others. Hints are folded below each task; the [solutions](../solutions/{lesson}.ipynb) come \
with a discussion."""
SOLVED_HOW = """
One solution for each task of the [sheet](../sheets/{lesson}.ipynb), and what to take from it. Yours may look \
different and be as right."""


@dataclass(frozen=True)
class Cell:
    """A cell of a source: its text without comment signs, whether it is prose, and its tag."""

    source: str
    prose: bool
    tag: str


@dataclass(frozen=True)
class Task:
    """What the call of `exercise` in a source says of a task."""

    number: str
    function: str
    minutes: int
    level: str


def read_cells(text: str) -> list[Cell]:
    """The cells of a file in percent format, in order; what stands before the first one is none."""
    cells, lines, mark = [], [], None
    for line in [*text.splitlines(), "# %%"]:
        if not (found := MARK.match(line)):
            lines.append(line)
            continue
        if mark:
            cells.append(_cell(mark, lines))
        mark, lines = found, []
    return cells


def _cell(mark, lines):
    prose = bool(mark["text"])
    if prose:
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    return Cell("\n".join(lines).strip("\n"), prose, (mark["tags"] or "").strip('"'))


def read_tasks(cells: list[Cell]) -> list[Task]:
    """The exercises that a source declares, by its calls of `exercise`."""
    calls = [
        node
        for cell in cells
        if not cell.prose
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exercise"
    ]
    return [
        Task(call.args[0].value, call.args[1].id, **{word.arg: word.value.value for word in call.keywords})
        for call in calls
    ]


def stubbed(code: str) -> str:
    """Code without its solutions: a line that raises stands for each."""
    return SOLVED.sub(lambda found: f"{found[1]}{STUB}\n", code).rstrip("\n")


def solved(code: str) -> str:
    """Code without the lines that mark its solutions."""
    return BORDER.sub("", code).rstrip("\n")


def make_sheet(lesson: str, text: str) -> NotebookNode:
    """The student's notebook.

    Args:
        lesson: its number, such as "04".
        text: the source.
    """
    sheet = _notebook(lesson, text, HOW, stubbed, {"": _as_it_is, "hint": _folded})
    put_cell(sheet, known_address())
    return sheet


def make_solutions(lesson: str, text: str) -> NotebookNode:
    """The notebook of solutions, not executed; the arguments as in `make_sheet`."""
    return _notebook(lesson, text, SOLVED_HOW, solved, {"": _as_it_is, "discussion": _discussed})


def _as_it_is(text):
    return text


def _folded(text):
    return f"<details><summary>A hint</summary>\n\n{text}\n\n</details>"


def _discussed(text):
    return f"**Discussion.** {text}"


def _notebook(lesson, text, how, edited, tags):
    cells = read_cells(text)
    tasks, made = read_tasks(cells), []
    for cell in cells:
        if cell.tag not in tags:
            continue
        if cell.prose:
            made.append(new_markdown_cell(_with_minutes(tags[cell.tag](cell.source), tasks)))
        else:
            made.append(new_code_cell(edited(cell.source)))
            made += [new_code_cell(f'check("{t.number}", {t.function})') for t in tasks if _defines(cell, t.function)]
    made[0].source += "\n" + how.format(lesson=lesson) + f" Back to {_lesson_link(lesson)}."
    for position, cell in enumerate(made):
        cell.id = f"{lesson}-{position:02}"
    return new_notebook(cells=made, metadata=METADATA, nbformat_minor=5)


def _with_minutes(text, tasks):
    for task in tasks:
        head = f"## {task.number} "
        if text.startswith(head):
            title, _, rest = text.partition("\n")
            return f"{title}\n*({task.minutes} min, {task.level})* {rest.strip()}"
    return text


def _defines(cell: Cell, function: str) -> bool:
    return any(isinstance(n, ast.FunctionDef) and n.name == function for n in ast.parse(cell.source).body)


def _lesson_link(lesson: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.ipynb")
    return f"[notebook {lesson}](../../notebooks/{path.name})"


def solution_statements(text: str) -> Iterator[str]:
    """Every statement of the solutions in a source, as its syntax tree: what no sheet may hold.

    Args:
        text: the source.
    """
    for cell in read_cells(text):
        for found in [] if cell.prose else SOLVED.finditer(cell.source):
            (body,) = ast.parse("def solution():\n" + textwrap.indent(textwrap.dedent(found[0]), "    ")).body
            yield from (ast.dump(node) for node in ast.walk(body) if isinstance(node, ast.stmt) and node is not body)


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, and nothing of the machine it was executed on."""
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
