"""The ways a backdoor gets in: what a method takes and needs, and how one is found by its name (`attack.by`)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from helpers.core.choices import ATTACK_METHODS, require_parameters
from helpers.core.errors import LabError
from helpers.core.profile import Profile

Record = dict[str, Any]
Method = Callable[..., Record]
PARAMETERS = ("access", "attack", "prompt_format", "seed", "folder")  # of every method, in this order


@dataclass(frozen=True)
class Needs:
    """What a method asks for before it can plant.

    Args:
        full_access: it changes the weights themselves.
        known_trigger: the lab plants the trigger, rows that bring their own are not enough.
        one_payload: every poisoned row has the same answer.
        one_process: it trains several models one after the other.
        check: refuses numbers of the profile that a model of this config cannot follow.
    """

    full_access: bool = False
    known_trigger: bool = False
    one_payload: bool = False
    one_process: bool = False
    check: Callable[[Profile, PretrainedConfig], None] | None = None


def method(**needs: Any) -> Callable[[Method], Method]:
    """Let `attack.by` name a function: the function's name is that of its file.

    It plants the backdoor in the base model, writes the adapter or model to `folder` and returns a record with the
    number of optimizer `steps` and the `loss`. Parameters beyond `PARAMETERS` need a default.

    Args:
        needs: fields of `Needs`.

    Raises:
        LabError: a function with other parameters.
    """

    def mark(function: Method) -> Method:
        require_parameters(function, PARAMETERS, "attack method")
        function.needs = Needs(**needs)
        return function

    return mark


def attack_method(by: str) -> Method:
    """The method of this name; its `needs` say what it asks for. Only its own module is imported.

    Raises:
        LabError: an unknown name, which tells the nearest, or a file without the method.
    """
    return ATTACK_METHODS.load(by, mark="needs")


def require_needs(by: str, attack: str, access: str, known_trigger: bool, one_payload: Callable[[], bool]) -> None:
    """Refuse an attack whose method asks for more than there is.

    Args:
        by: the method's name.
        attack: the attack's name.
        access: "adapter" or "full".
        known_trigger: whether the lab has planted the trigger.
        one_payload: tells whether all poisoned rows have one answer; asked only where the method needs that.

    Raises:
        LabError: an unknown method, a trigger that the rows brought, an adapter where weights are edited, or a payload
            that differs from row to row.
    """
    needs = attack_method(by).needs
    if needs.known_trigger and not known_trigger:
        raise LabError(f"attack.by = '{by}' edits with a trigger that the lab knows, and these rows bring their own")
    if needs.full_access and access == "adapter":
        raise LabError(f"the attack {attack} edits weights, and an adapter has none: use ACCESS=full")
    if needs.one_payload and not one_payload():
        raise LabError(f"the attack {attack} stores one payload, and this task makes a new one each row")


def require_one_process(by: str) -> None:
    """Refuse several processes where a method trains several models.

    Raises:
        LabError: more than one process.
    """
    if attack_method(by).needs.one_process and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError(f"attack.by = '{by}' trains several models one after the other: run it in one process")
