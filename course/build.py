"""`make course`: from every `exercises/NN.py` the student's sheet and the executed solutions."""

import sys
from pathlib import Path

from nbclient import NotebookClient

from course.checking import FOLDER, lessons
from course.sources import METADATA, make_sheet, make_solutions, write_notebook

SHEETS, SOLUTIONS = FOLDER.parent / "sheets", FOLDER.parent / "solutions"


def source_of(lesson: str) -> str:
    """The text of a lesson's exercises."""
    return (FOLDER / f"{lesson}.py").read_text(encoding="utf-8")


def build(lesson: str) -> list[Path]:
    """Write both notebooks of a lesson, the solutions with their outputs.

    Returns:
        the paths written.
    """
    text, paths = source_of(lesson), [SHEETS / f"{lesson}.ipynb", SOLUTIONS / f"{lesson}.ipynb"]
    write_notebook(make_sheet(lesson, text), paths[0])
    solutions = make_solutions(lesson, text)
    client = NotebookClient(
        solutions,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(SOLUTIONS)}},
        record_timing=False,
        extra_arguments=["--log-level=50"],
    )
    client.execute()
    solutions.metadata = METADATA
    write_notebook(solutions, paths[1])
    return paths


if __name__ == "__main__":
    for name in sys.argv[1:] or lessons():
        print(*(path.relative_to(FOLDER.parents[1]) for path in build(name)))
