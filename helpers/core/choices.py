"""Functions that a setting chooses by name, each in a file of its own whose name it bears.

The names are read off the folders, so a name is checked without importing any of the files, and a choice imports its
own file alone: what it depends on can be read from that module.
"""

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from helpers.core.errors import LabError, nearest


@dataclass(frozen=True)
class Choices:
    """The functions that one setting chooses from.

    Args:
        setting: its dotted name, for errors.
        packages: the packages whose every file holds one function.
        space: what stands in a name where the file has an underscore.
    """

    setting: str
    packages: tuple[str, ...]
    space: str = "_"

    def modules(self) -> dict[str, str]:
        """The module of each name.

        Raises:
            LabError: two files of one name.
        """
        found: dict[str, str] = {}
        for package in self.packages:
            for file in pkgutil.iter_modules(import_module(package).__path__):
                name, module = file.name.replace("_", self.space), f"{package}.{file.name}"
                if name in found:
                    raise LabError(f"{self.setting} = '{name}' is both {found[name]} and {module}: rename one of them")
                found[name] = module
        return found

    def require(self, name: str, setting: str = "") -> str:
        """The module of a name, which is not imported.

        Args:
            setting: as errors call the setting here, where it is not `self.setting`.

        Raises:
            LabError: an unknown name; it gives the nearest.
        """
        modules = self.modules()
        if name not in modules:
            raise LabError(f"{setting or self.setting} = '{name}' is unknown{nearest(name, modules)}")
        return modules[name]

    def load(self, name: str, mark: str) -> Callable[..., object]:
        """The function of a name; no other file is imported.

        Args:
            mark: the attribute that its decorator gives it.

        Raises:
            LabError: an unknown name, or a file without a decorated function of this name.
        """
        module = self.require(name)
        function = module.rpartition(".")[2]
        found = getattr(import_module(module), function, None)
        if not hasattr(found, mark):
            raise LabError(f"{self.setting} = '{name}': {module} should hold a decorated function '{function}'")
        return found


def require_parameters(function: Callable[..., object], wanted: Sequence[str], what: str) -> None:
    """Refuse a function that is called with other arguments than it takes.

    Args:
        wanted: what it is called with, in this order; any parameter beyond needs a default.
        what: as errors call a function of its kind.

    Raises:
        LabError: other parameters.
    """
    taken = inspect.signature(function).parameters.values()
    unfilled = [each.name for each in taken if each.name in wanted or each.default is each.empty]
    if unfilled != [*wanted]:
        found = ", ".join(unfilled)
        raise LabError(f"{what} '{function.__name__}': its parameters should be {', '.join(wanted)}, found {found}")


ATTACK_METHODS = Choices("attack.by", ("helpers.attacks.methods", "helpers.adaptive.methods"))
COMBINATIONS = Choices("attack.combine", ("helpers.data.combinations",), space=" ")
DEFENSES = Choices("defense", ("helpers.defenses.methods", "helpers.oracles.methods"))
