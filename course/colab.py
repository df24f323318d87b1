"""`make colab`: copies of the notebooks for Google Colab, each with one folded cell that fetches the lab.

Colab gives every notebook an empty machine. The copies therefore begin with a cell that clones the repository, installs
the locked packages, unpacks a finished run that was uploaded, and changes into the clone. The notebooks of the
repository stay without it: their cells are numbered and executed in order, and elsewhere it would only be in the way.
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

COPIES = ROOT / "site" / "_build" / "colab"
CITATION, KEY = ROOT / "CITATION.cff", "repository-code"  # the one place for the repository's address
KNOWN = re.compile(r"(https|file)://[\w.~/:+-]+")
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # as Colab and JupyterLab fold the code of a cell
CELL = """# @title Google Colab: fetch the lab (anywhere else this does nothing)
def fetch_lab(address):
    import os
    import subprocess
    import sys
    from pathlib import Path

    home, lab = Path.cwd(), Path.cwd() / "lab"
    if "google.colab" not in sys.modules or home.name == "notebooks":
        return

    def run(*words):
        subprocess.run(words, check=True)

    if not lab.exists():
        run("git", "clone", "--depth", "1", address, str(lab))
    install = (sys.executable, "-m", "pip", "install", "--quiet")
    run(*install, "-r", str(lab / "requirements-lock.txt"))
    run(*install, "--no-deps", "--no-build-isolation", "--editable", str(lab))
    os.chdir(lab / "notebooks")
    sys.path.insert(0, str(lab))  # this kernel is older than the installation
    os.environ["PYTHONPATH"] = str(lab)
    for pack in home.glob("*.tar.gz"):
        run(sys.executable, "-m", "helpers.run.packing", "unpack", str(pack))


fetch_lab({address!r})"""


def known_address() -> str:
    """The repository's address in CITATION.cff; "" where it is not entered."""
    return yaml.safe_load(CITATION.read_text(encoding="utf-8")).get(KEY, "")


def colab_cell(address: str) -> nbformat.NotebookNode:
    """The cell that fetches the lab on Colab, the same for every notebook.

    Args:
        address: of the repository, as `git clone` takes it.

    Raises:
        LabError: it is empty or no address.
    """
    if not address:
        raise LabError(f"the repository's address is not known: say ADDRESS=https://…, or enter {KEY} in CITATION.cff")
    if not KNOWN.fullmatch(address):
        raise LabError(f"ADDRESS = '{address}' should be an address that git clones, such as https://host/owner/name")
    return new_code_cell(CELL.replace("{address!r}", repr(address)), id="colab", metadata=FOLDED)


def write_copies(address: str, folder: Path = COPIES) -> list[Path]:
    """Write a copy of each notebook with the cell behind its title.

    Args:
        address: as in `colab_cell`.
        folder: made on demand.

    Returns:
        the copies.
    """
    cell, copies = colab_cell(address), []
    folder.mkdir(parents=True, exist_ok=True)
    for path in numbered():
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(1, cell)
        nbformat.write(notebook, folder / path.name)
        copies.append(folder / path.name)
    return copies


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m course.colab", description="Copies of the notebooks for Colab.")
    parser.add_argument("--address", default="", help=f"of the repository; {KEY} of CITATION.cff when empty")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(*write_copies(options.address or known_address()), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
