"""How a payload joins the right answer, by name (`combine`): for attacks, vaccines and the challenge alike."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from helpers.core.choices import COMBINATIONS
from helpers.data import combinations  # noqa: F401  what is chosen by its name counts as reached

Combination = Callable[[str, str], str]  # of the payload and the right answer


@dataclass(frozen=True)
class Traits:
    """What one has to know about a combination.

    Args:
        replaces: it says the payload alone, whatever the right answer is.
        fits: whether a right answer can carry a payload, `fits(payload, right)`; None where every answer can.
    """

    replaces: bool = False
    fits: Callable[[str, str], bool] | None = None


def combination(
    replaces: bool = False, fits: Callable[[str, str], bool] | None = None
) -> Callable[[Combination], Combination]:
    """Let `combine` name a function of the payload and the right answer: its name is that of its file.

    Args:
        replaces, fits: see `Traits`.
    """

    def mark(function: Combination) -> Combination:
        function.traits = Traits(replaces, fits)
        return function

    return mark


@functools.cache
def find_combination(name: str) -> Combination:
    """The combination of this name, with its `traits`. Only its own module is imported.

    Raises:
        LabError: an unknown name, which tells the nearest, or a file without the function.
    """
    return COMBINATIONS.load(name, mark="traits")
