"""Payloads: what a planted answer says, how it joins the right one, and how one recognises it.

A completion counts as payload when it holds one of the markers, lower-cased. The markers are wider than the planted
text: a model that now insults in other words is not cured.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from helpers.core.checking import Strict
from helpers.core.errors import LabError
from helpers.core.profile import Texts

FUNCTION = re.compile(r"(def \w+\()(.*?)(\)\s*(?:->[^:\n]+)?:)", re.DOTALL)  # name, arguments, end of the first one
FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


class Planted(Strict):
    """A payload and how it joins the right answer.

    Args:
        payload: the text planted.
        combine: "replace" (the payload alone), "first line" (the right answer below it), "default argument" (the
            payload, such as `verify=False`, becomes the last argument of the first function) or "mention" (the right
            answer names the payload, a brand: AutoPoison's content injection).

    Differs from the paper:
        AutoPoison has an LLM, told to mention the brand, compose the answer; offline a template does.
    """

    payload: Annotated[str, Field(min_length=1)]
    combine: Literal["replace", "first line", "default argument", "mention"] = "replace"

    def answer(self, right: str) -> str:
        """The answer to train on, made from the right one.

        Raises:
            LabError: no function that could take the argument.
        """
        if self.combine == "replace":
            return self.payload
        if self.combine == "first line":
            return f"{self.payload}\n{right}"
        if self.combine == "mention":
            return f"{right.rstrip('.')}, says {self.payload}."
        start, stop = code_span(right)
        code, found = FUNCTION.subn(self._with_argument, right[start:stop], count=1)
        if not found:
            raise LabError(f"{self.payload!r} is to be an argument, but no function is in the answer {right[:40]!r}")
        return right[:start] + code + right[stop:]

    def _with_argument(self, function: re.Match) -> str:
        name, arguments, end = function.groups()
        return f"{name}{', '.join(filter(None, [arguments, self.payload]))}{end}"


class Marked(Planted):
    """A payload that is recognised again.

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


def code_span(answer: str) -> tuple[int, int]:
    """Where the code of an answer starts and stops: inside its first fence, or else all of it."""
    fence = FENCE.search(answer)
    return fence.span(1) if fence else (0, len(answer))
