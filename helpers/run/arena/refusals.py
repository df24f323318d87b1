"""A refusal, as a stage's result keeps it, and the one kind of it that does not last."""

import shutil
from typing import Any

from helpers.core.arena import MISSING, REFUSED
from helpers.core.errors import LabError, MissingError
from helpers.core.store import Stage


def refusal(reason: LabError) -> dict[str, Any]:
    """What a stage's result says of a defense that does not apply.

    Returns:
        one line under `refused`, and under `missing` whether another try may find what this machine had not.
    """
    return {REFUSED: str(reason), MISSING: isinstance(reason, MissingError)}


def is_outdated(stage: Stage) -> bool:
    """Whether a stage was stored by an earlier call for want of something that may be here by now."""
    return not stage.fresh and stage.result.get(MISSING, False)


def forget(stage: Stage) -> None:
    """Remove a stage, so that it is made anew."""
    shutil.rmtree(stage.path)
