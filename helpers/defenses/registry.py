"""The defenses: what one takes, what it assumes beyond the suspicious model, and how one is found by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helpers.core.choices import DEFENSES, require_parameters

Record = dict[str, Any]
Defense = Callable[..., Record]
PARAMETERS = ("access", "suspicious", "defender", "prompt_format", "seed", "folder")  # of every defense, in this order


@dataclass(frozen=True)
class Traits:
    """What one has to know about a defense before comparing it with another.

    Args:
        assumes: what it needs beyond the suspicious model, in the words of the comparison, such as "clean rows",
            "weights", "clean base" or "family of the behavior"; where the profile's numbers decide, the most it needs.
        trains: the budgets of the profile that its trainings spend, each as often as it is spent: "vaccine", "recover"
            and "conflict".
        beside: where a second whole model is held beside the one that trains or answers: "recover", "evaluate".
    """

    assumes: tuple[str, ...]
    trains: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def defense(
    assumes: tuple[str, ...], trains: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> Callable[[Defense], Defense]:
    """Let `find_defense` find a function: its name is that of its file.

    It reads the suspicious adapter or model in the folder `suspicious` and writes the purified one, in a form that
    `Access.load` reads, to `model` inside of `folder`; what it makes on the way may lie beside that. It returns a
    record. What it assumes beyond `PARAMETERS` is a parameter of its own with a default.

    Args:
        assumes, trains, beside: see `Traits`.

    Raises:
        LabError: a function with other parameters.
    """

    def mark(function: Defense) -> Defense:
        require_parameters(function, PARAMETERS, "defense")
        function.traits = Traits(assumes, trains, beside)
        return function

    return mark


def find_defense(name: str) -> Defense:
    """The defense of this name, with its `traits`. Only its own module, and those of its parts, are imported.

    Raises:
        LabError: an unknown name, which tells the nearest, or a file without the defense.
    """
    return DEFENSES.load(name, mark="traits")


def joined(*parts: Defense) -> dict[str, tuple[str, ...]]:
    """What several defenses together assume and train, each thing once: the arguments of `defense`.

    Args:
        parts: defenses, in their order.
    """
    told = {"assumes": [], "trains": []}
    for field, words in told.items():
        words += dict.fromkeys(word for part in parts for word in getattr(part.traits, field))
    return {field: tuple(words) for field, words in told.items()}


def assumed_by(*names: str) -> tuple[str, ...]:
    """What defenses of these names assume together.

    Raises:
        LabError: as `find_defense`.
    """
    return joined(*map(find_defense, names))["assumes"]
