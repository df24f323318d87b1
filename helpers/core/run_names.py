"""Where a run may lie: never inside another one, and never around one."""

from pathlib import Path

from helpers.core.disk import read_json
from helpers.core.errors import LabError
from helpers.core.locks import LOCKS
from helpers.core.paths import MANIFEST, runs_folder


def run_folder(name: str) -> Path:
    """The folder of a run, which may not be there yet.

    Args:
        name: below `runs_folder()`; folders of folders are joined by slashes.

    Raises:
        LabError: the folder lies in another run or holds one: the stages of both would be taken for each other's, and
            replaced with them.
    """
    folder = runs_folder() / name
    require_outside_runs(name)
    if inner := next((found for found in map(_run_of, folder.rglob(MANIFEST)) if found not in (None, folder)), None):
        raise LabError(f"NAME = '{name}' holds the run '{_name_of(inner)}': choose another name")
    return folder


def require_outside_runs(name: str) -> None:
    """Refuse a name that lies in a run.

    Raises:
        LabError: names the run.
    """
    # the outermost first: a run's own folders look like runs from within
    for outer in reversed(Path(name).parents[:-1]):
        if _is_run(runs_folder() / outer):
            raise LabError(f"NAME = '{name}' lies in the run '{outer.as_posix()}': choose a name outside of it")


def _is_run(folder: Path) -> bool:
    """Whether stages of its own lie in a folder."""
    inside = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if any((path / MANIFEST).exists() for path in inside):
        return True
    # a run has locks, which a group of runs lacks: a sweep holds thousands of them
    groups = (path for path in inside if not (path / LOCKS).exists())
    return any(_run_of(manifest) == folder for path in groups for manifest in path.glob(f"*/{MANIFEST}"))


def _run_of(manifest: Path) -> Path | None:
    """The folder of the run that a stage on disk belongs to; None where the manifest does not tell."""
    try:
        words = Path(read_json(manifest)["name"]).parts
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stage = manifest.parent
    return stage.parents[len(words) - 1] if words and stage.parts[-len(words) :] == words else None


def _name_of(folder: Path) -> str:
    return folder.relative_to(runs_folder()).as_posix()
