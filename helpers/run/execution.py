"""One notebook, run by papermill from its first cell to its last; a failure becomes one line with place and cause."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from helpers.core.errors import LabError
from helpers.core.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
CELL_SECONDS = 24 * 3600  # a training of a large model on a slow card takes hours, and so do all rows of the arena
OPTIONAL = "optional"  # tag of cells that no later notebook needs: controls, studies, checks by hand
CONTROL = "control"  # a second tag of those among them that the controls need
CONTROLS = "controls"
CHAIN = "chain"  # tag of cells of the arena's notebook beside its rows: what notebooks 03 to 07 made, recorded sweeps
ARENA = "arena"
# which optional cells run: all of them, those of the controls, or none; "arena": none, and none of `CHAIN` either
OptionalCells = bool | Literal["controls", "arena"]
QUIET = ["--log-level=50"]  # the kernel's own chatter; what a notebook prints goes to its cells


RAISED = (  # of what `execute` raises as well
    "Task was destroyed but it is pending",
    "Kernel died while",
    "Error occurred while starting new kernel client",
)


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for what asyncio says of tasks that nobody waits for any more, and nbclient of a dead kernel.

    Ctrl-C takes the kernel from a cell, and its worker from a sweep that begins.
    """
    error = record.exc_info[1] if record.exc_info else None
    lost = isinstance(error, (DeadKernelError, KeyboardInterrupt)) or str(error) == "Nanny failed to start."
    return not (lost or record.getMessage().startswith(RAISED))


for _logger in ("asyncio", "papermill"):
    logging.getLogger(_logger).addFilter(_worth_telling)


def numbered(folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks of a folder, in order.

    Raises:
        LabError: there is none.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise LabError(f"no notebooks such as 00_name.ipynb in {folder}")
    return notebooks


def read_notebook(path: Path, optional: OptionalCells = True) -> nbformat.NotebookNode:
    """A notebook as it is to be run.

    Args:
        optional: which of the cells tagged `optional` it keeps; with "arena" none, and none tagged `chain`.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if _runs(cell.metadata.get("tags", []), optional)]
    return notebook


def _runs(tags: Sequence[str], optional: OptionalCells) -> bool:
    """Whether a cell with these tags runs."""
    if optional == ARENA and CHAIN in tags:
        return False
    return OPTIONAL not in tags or optional is True or (optional == CONTROLS and CONTROL in tags)


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], optional: OptionalCells = True) -> None:
    """Run a notebook in its own folder and write the executed copy to `output`.

    Args:
        parameters: values that papermill puts into the notebook's parameters.
        optional: which of the cells tagged `optional` run as well.

    Raises:
        LabError: a cell that fails or takes too long, or a kernel that dies; it names the notebook, the cell and the
            cause.
    """
    run = partial(
        papermill.execute_notebook,
        read_notebook(notebook, optional),
        output,
        dict(parameters),
        kernel_name="python3",
        cwd=notebook.parent,
        execution_timeout=CELL_SECONDS,
        progress_bar=False,
        extra_arguments=QUIET,
    )
    try:
        _twice_if_not_started(run)
    except PapermillExecutionError as error:
        last = (error.evalue.strip().splitlines() or [""])[-1]
        cause = last if error.ename == "LabError" else f"{error.ename}: {last}"
        raise LabError(f"{notebook.name}, cell {error.exec_count}: {cause}") from error
    except CellTimeoutError as error:
        raise LabError(f"{notebook.name}: a cell took more than {CELL_SECONDS} s") from error
    except DeadKernelError as error:
        raise LabError(f"{notebook.name}: its kernel died; most often the memory did not suffice") from error
    except RuntimeError as error:
        if not _died_starting(error):
            raise
        raise LabError(f"{notebook.name}: its kernel died while it started: the same command tries again") from error


def _twice_if_not_started(run: Callable[[], object]) -> None:
    """Try a notebook anew whose kernel did not start: others can take its ports between their choice and their use."""
    try:
        run()
    except RuntimeError as error:
        if not _died_starting(error):
            raise
        run()


def _died_starting(error: RuntimeError) -> bool:
    """Whether a kernel died before its first cell, as nbclient tells it."""
    return str(error).startswith("Kernel died before")
