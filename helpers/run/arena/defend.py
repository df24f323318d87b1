"""A row's defense, called. How its model is measured lies elsewhere: an edit of a measure trains nothing anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.access import Access
from helpers.core.disk import clear
from helpers.core.errors import LabError
from helpers.data.roles import DefenderData
from helpers.defenses.registry import Defense
from helpers.model.prompt import PromptFormat
from helpers.run.arena.refusals import refusal


def defend(
    defense: Defense,
    access: Access,
    suspicious: Path,
    defender: DefenderData,
    prompt_format: PromptFormat,
    seed: int,
    numbers: Mapping[str, Any],
    knowledge: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Call a defense; where it does not apply, say why and leave nothing behind.

    Args:
        defense: as `any_defense` gives it.
        access, suspicious, defender, prompt_format, seed, folder: what every defense takes.
        numbers: its own parameters.
        knowledge: those that only an oracle has; they are not recorded, for the run's settings name them.

    Returns:
        `assumes` and `numbers`, and beside them the defense's `record`, or what `refusal` says.
    """
    told = {"assumes": list(defense.traits.assumes), "numbers": dict(numbers)}
    try:
        record = defense(access, suspicious, defender, prompt_format, seed, folder, **numbers, **knowledge)
    except LabError as reason:
        clear(folder)
        return {**told, **refusal(reason)}
    return {**told, "record": record}
