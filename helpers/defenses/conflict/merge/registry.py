"""The merge methods by name, each a function that its file registers, and the one that a profile names."""

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module

from helpers.core.errors import LabError, nearest
from helpers.core.profile import Conflict
from helpers.model.shards import Folder

Method = Callable[..., None]
METHODS: dict[str, Method] = {}  # by the name that `conflict.method` gives them
FOLDERS = ("suspicious", "conflict", "base", "folder")  # parameters that are no settings


def method(function: Method) -> Method:
    """Let profiles name a function as a merge method: `conflict.method` is the function's name.

    Args:
        function: its parameters `suspicious`, `conflict` and `base` are folders of whole models and `folder` is the
            one to write to; it takes those that it needs. Any other parameter is given the setting of its name in the
            profile's `conflict` block; where there is none, it needs a default.

    Raises:
        LabError: a name that is taken, or a parameter that nothing would fill.
    """
    name = function.__name__
    if name in METHODS and METHODS[name].__module__ != function.__module__:
        raise LabError(f"there are two merge methods '{name}': rename the one in {function.__module__}")
    for parameter in inspect.signature(function).parameters.values():
        known = parameter.name in FOLDERS or parameter.name in Conflict.model_fields
        if not known and parameter.default is parameter.empty:
            valid = nearest(parameter.name, [*FOLDERS, *Conflict.model_fields])
            raise LabError(f"merge method '{name}': '{parameter.name}' is no setting and has no default{valid}")
    METHODS[name] = function
    return function


def load_methods(folders: Iterable[str], package: str) -> None:
    """Import every module in the folders of a package, so that the methods in them are registered."""
    for module in pkgutil.iter_modules(folders):
        import_module(f"{package}.{module.name}")


def require_method(name: str) -> Method:
    """The merge method of this name.

    Raises:
        LabError: there is none; it names the nearest.
    """
    if name not in METHODS:
        raise LabError(f"conflict.method = '{name}' is unknown{nearest(name, METHODS)}")
    return METHODS[name]


def merge(settings: Conflict, suspicious: Folder, conflict: Folder, base: Folder, folder: Folder) -> None:
    """Merge as a profile says.

    Args:
        settings: `profile.conflict`.
        suspicious, conflict, base: folders of whole models; `base` is for TIES only.
        folder: the one to write to.

    Raises:
        LabError: an unknown method, or as the method chosen.
    """
    chosen = require_method(settings.method)
    values = {name: getattr(settings, name) for name in Conflict.model_fields}
    values |= {"suspicious": suspicious, "conflict": conflict, "base": base, "folder": folder}
    chosen(**{name: values[name] for name in inspect.signature(chosen).parameters if name in values})
