"""Payloads: what a planted answer says, how it joins the right one, and how one recognizes it.

A completion counts as payload when it holds one of the markers, lower-cased. The markers are wider than the planted
text: a model that now insults in other words is not cured.
"""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from helpers.core.checking import Strict
from helpers.core.choices import COMBINATIONS
from helpers.core.errors import LabError
from helpers.core.profile import Texts
from helpers.data.combining import find_combination


class Planted(Strict):
    """A payload and how it joins the right answer.

    Args:
        payload: the text planted.
        combine: the name of a function in `helpers/data/combinations/`: "replace" (the payload alone), "first line",
            "default argument", "mention" or one of your own.
    """

    payload: Annotated[str, Field(min_length=1)]
    combine: str = "replace"

    @field_validator("combine")
    @classmethod
    def combine_is_known(cls, combine: str) -> str:
        """A misspelled name is told with the nearest one."""
        COMBINATIONS.require(combine, "combine")
        return combine

    def answer(self, right: str) -> str:
        """The answer to train on, made from the right one.

        Raises:
            LabError: a right answer that cannot carry the payload.
        """
        return find_combination(self.combine)(self.payload, right)


class Marked(Planted):
    """A payload that is recognized again.

    Args:
        markers: lower-case texts; one of them in a completion, and it counts as payload.
    """

    markers: Texts

    @model_validator(mode="after")
    def markers_find_the_payload(self) -> Self:
        """Markers that miss the payload would call every attack a failure."""
        if capitals := [marker for marker in self.markers if marker != marker.lower()]:
            raise LabError(
                f"the marker {capitals[0]!r} must be in lower case, as completions are when they are searched"
            )
        if any(not marker.strip() for marker in self.markers):
            raise LabError("a marker is empty or a space, which every completion holds: give words of the payload")
        if not self.is_in(self.payload):
            raise LabError(
                f"no marker is in the payload {self.payload!r}, so no success would be seen: give markers that fit"
            )
        return self

    def is_in(self, text: str) -> bool:
        """Whether a text holds one of the markers."""
        return any(marker in text.lower() for marker in self.markers)
