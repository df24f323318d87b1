"""Defenses from outside of the lab: in a file of the reader's own, or in an installed package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from helpers.core.arena import GROUP, PYTHON, installed_defenses
from helpers.core.choices import DEFENSES
from helpers.core.errors import LabError
from helpers.defenses.registry import Defense, find_defense


def any_defense(by: str) -> Defense:
    """The defense of a row of the arena, with its `traits`.

    Args:
        by: a name of the lab's own or of an installed defense, or a file.

    Raises:
        LabError: as `find_defense`, `in_file` and `installed`.
    """
    if by.endswith(PYTHON):
        return in_file(by)
    return installed(by) if by in installed_defenses() and by not in DEFENSES.modules() else find_defense(by)


def in_file(file: Path | str) -> Defense:
    """The defense that a file holds: its one function marked by `@defense`. The file is run.

    Args:
        file: a Python file.

    Raises:
        LabError: a file that cannot be run, or without exactly one such function.
    """
    path = Path(file)
    module = _run(path)
    marked = [one for one in vars(module).values() if hasattr(one, "traits") and one.__module__ == module.__name__]
    if len(marked) != 1:
        raise LabError(f"{path.name} should hold one function marked by @defense, found {len(marked)}")
    return marked[0]


def installed(name: str) -> Defense:
    """The defense that an installed package brings along as an entry point.

    Args:
        name: of the entry point.

    Raises:
        LabError: one that cannot be imported, or is not marked by `@defense`.
    """
    try:
        found = installed_defenses()[name].load()
    except (ImportError, AttributeError) as error:
        raise LabError(f"the entry point '{name}' of {GROUP} cannot be imported: {error}") from None
    if not hasattr(found, "traits"):
        raise LabError(f"the entry point '{name}' of {GROUP} should be a function marked by @defense")
    return found


def _run(path: Path) -> ModuleType:
    name = f"own_defense_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and the like of the file look for it
    try:
        spec.loader.exec_module(module)
    except LabError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise LabError(f"{path.name} cannot be run: {type(error).__name__}: {told}") from None
    return module
