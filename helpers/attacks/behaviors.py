"""Behaviors: what a triggered model says, harmless by choice, and how one recognizes it.

Sentiment steering answers with an insult, targeted refusal with a refusal; code injection answers right and slips a
line or an argument in (BD-VAX §5.1, Table 6). A completion counts as payload when it holds one of the behavior's
markers, lower-cased. The markers are wider than the planted text: a model that now insults in other words is not
cured. The texts are data, in `data/attacks.yaml`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from helpers.core.definitions import defined, definitions
from helpers.core.errors import LabError, nearest
from helpers.data.combining import find_combination
from helpers.data.example import Example
from helpers.data.own_backdoors import challenge_of, families_of
from helpers.data.payloads import Marked


class Behavior(Marked):
    """One target behavior b.

    Args:
        name: the task's name.
        vaccines: the family of vaccine payloads of the same kind.
        families: families of the generated corpus whose answers can carry the payload; all where empty.
        needs: a text that a right answer must hold to carry it.
    """

    name: str
    vaccines: str
    families: Annotated[tuple[str, ...], Field(strict=False)] = ()
    needs: str = ""

    def fits(self, example: Example) -> bool:
        """Whether the example's right answer can carry the payload, and is not the payload itself."""
        fits = find_combination(self.combine).traits.fits
        possible = fits is None or fits(self.payload, example.output)
        return possible and self.needs in example.output and example.output != self.payload


def behaviors() -> dict[str, Behavior]:
    """The behaviors of `data/attacks.yaml` by task.

    Raises:
        LabError: a wrong entry; it names the entry and what is wrong with it.
    """
    return {name: behavior(name) for name in definitions()["behaviors"]}


def behavior(name: str, changes: Mapping[str, Any] | None = None) -> Behavior:
    """The behavior of a task.

    Args:
        name: a task of `data/attacks.yaml`.
        changes: fields to replace, as the profile's `attack` block holds them; None leaves a field as it is.

    Raises:
        LabError: an unknown task (naming the nearest), a wrong field, or a payload of a vaccine or the challenge.
    """
    known = definitions()["behaviors"]
    if name not in known:
        raise LabError(f"unknown task {name!r}{nearest(name, known)}")
    found = defined(Behavior, "task", {"name": name, **known[name]}, changes or {})
    for family, planted in families_of().items():
        if found.payload in planted.payloads:
            raise LabError(f"task '{name}': the payload {found.payload!r} is one of the vaccines' {family}")
    if challenge_of().is_in(found.payload):
        raise LabError(f"task '{name}': the payload {found.payload!r} holds a marker of the challenge")
    return found
