"""`make colab`: the folded cell behind the title of every lesson and sheet that fetches the lab on Google Colab.

Colab gives every notebook an empty machine, so the cell clones the repository and runs `on_colab.py` from the clone.
Anywhere else it does nothing. The repository's address stands in CITATION.cff; where none is entered there, the cell
has a field for it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell

from helpers.core.errors import LabError, exit_status
from helpers.core.paths import ROOT
from helpers.run.execution import numbered

CITATION, KEY = ROOT / "CITATION.cff", "repository-code"  # the one place for the repository's address
SHEETS = ROOT / "course" / "sheets"
KNOWN = re.compile(r"(https|file)://[\w.~/:+-]+")
ID = "colab"
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # as Colab and JupyterLab fold the code of a cell
CELL = """# @title Google Colab: fetch the lab (anywhere else this does nothing)
def fetch_lab(repository):
    import runpy
    import subprocess
    import sys
    from pathlib import Path

    if "google.colab" not in sys.modules or Path.cwd().name == "notebooks":
        return
    if not repository:
        raise ValueError("type the address of the lab's repository into the field above, then run this cell again")
    if not Path("lab").exists():
        subprocess.run(["git", "clone", "--depth", "1", repository, "lab"], check=True)
    runpy.run_path("lab/course/on_colab.py", run_name="__main__")


repository = {address}  # @param {{type: "string"}}
fetch_lab(repository)"""


def known_address() -> str:
    """The repository's address in CITATION.cff; "" where it is not entered.

    Raises:
        LabError: it is no address.
    """
    return require_address(yaml.safe_load(CITATION.read_text(encoding="utf-8")).get(KEY) or "")


def require_address(address: str) -> str:
    """An address as it is, where `git clone` takes it and a notebook can hold it; "" for none.

    Raises:
        LabError: it is neither.
    """
    if address and not KNOWN.fullmatch(address):
        raise LabError(f"ADDRESS = '{address}' should be an address that git clones, such as https://host/owner/name")
    return address


def colab_cell(address: str) -> nbformat.NotebookNode:
    """The cell that fetches the lab on Colab, the same in every notebook.

    Args:
        address: of the repository; "" for a field to type it into.
    """
    return new_code_cell(CELL.format(address=f'"{address}"'), id=ID, metadata=FOLDED)


def put_cell(notebook: nbformat.NotebookNode, address: str) -> None:
    """Put the cell behind the title, in place of the one that is there.

    An executed notebook stays one from a single run: a new cell takes the first number, for it does nothing here.
    """
    cell = colab_cell(address)
    others = [other for other in notebook.cells if other.id != ID]
    executed = [other for other in others if other.get("execution_count")]
    if executed:
        cell.execution_count = 1
        for number, other in enumerate(executed, 2):
            other.execution_count = number
    notebook.cells = [others[0], cell, *others[1:]]


def enter_address(address: str) -> None:
    """Enter the repository's address into CITATION.cff, in place of the one that is there.

    Raises:
        LabError: it is no address; nothing is changed then.
    """
    line = f"{KEY}: {require_address(address)}"
    lines = CITATION.read_text(encoding="utf-8").splitlines()
    at = next((i for i, text in enumerate(lines) if text.startswith(f"{KEY}:")), None)
    if at is None:
        lines.insert(1, line)
    else:
        lines[at] = line
    CITATION.write_text("\n".join(lines) + "\n", encoding="utf-8")


def notebooks() -> list[Path]:
    """What a student opens: the lessons and the sheets of exercises."""
    return numbered() + sorted(SHEETS.glob("[0-9][0-9].ipynb"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m course.colab", description="The notebooks' cell for Google Colab.")
    parser.add_argument("--address", default="", help=f"of the repository, entered into {CITATION.name}")
    options = parser.parse_args(arguments)

    def write() -> None:
        if options.address:
            enter_address(options.address)
        address = known_address()
        for path in notebooks():
            notebook = nbformat.read(path, as_version=4)
            put_cell(notebook, address)
            nbformat.write(notebook, path)
        print(f"{len(notebooks())} notebooks fetch the lab from {address or 'an address to be typed in'}")

    return exit_status(write)


if __name__ == "__main__":
    sys.exit(main())
