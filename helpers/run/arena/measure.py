"""How the model of a row is measured: as all others are, decoded as its defense wants it."""

from pathlib import Path
from typing import Any

from helpers.access import Access
from helpers.core.errors import LabError
from helpers.data.roles import Trial
from helpers.defenses.decoding import load_defended
from helpers.measure.report import evaluate
from helpers.model.prompt import PromptFormat
from helpers.run.arena.refusals import refusal


def measure(access: Access, folder: Path, prompt_format: PromptFormat, trial: Trial, _: Path) -> dict[str, Any]:
    """The report of what a defense has left in a folder.

    Args:
        access: how it is loaded; its profile has lengths and batch size.
        folder: that the defense wrote to.
        prompt_format: how to ask.
        trial: what to ask.

    Returns:
        the report of `evaluate`; where the model cannot be measured so, what `refusal` says.
    """
    try:
        model, decoding = load_defended(access, folder)
        return evaluate(model, prompt_format, trial, access.profile, decoding=decoding)
    except LabError as reason:
        return refusal(reason)
