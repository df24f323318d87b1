"""Behaviors: what a triggered model says, harmless by choice, and how one recognises it.

Sentiment steering answers with an insult, targeted refusal with a refusal; code injection answers right and slips a
line or an argument in (BD-VAX §5.1, Table 6). A completion counts as payload when it holds one of the behavior's
markers, lower-cased. The markers are wider than the planted text: a model that now insults in other words is not
cured. The texts are data, in `data/attacks.yaml`.
"""

import itertools
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from helpers.core.checking import Strict, checked
from helpers.core.definitions import DEFINITIONS, defined, definitions
from helpers.core.errors import LabError, nearest
from helpers.core.profile import Texts
from helpers.data.example import Example

FUNCTION = re.compile(r"(def \w+\()(.*?)(\)\s*(?:->[^:\n]+)?:)", re.DOTALL)  # name, arguments, end of the first one
FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


class Planted(Strict):
    """A payload and how it joins the right answer.

    Args:
        payload: the text planted.
        combine: "replace" (the payload alone), "first line" (the right answer below it), "default argument" (the
            payload, such as `verify=False`, becomes the last argument of the first function) or "mention" (the right
            answer names the payload, a brand: AutoPoison's content injection).

    Differs from AutoPoison: there an LLM, told to mention the brand, composes the answer; offline a template does.
    """

    payload: Annotated[str, Field(min_length=1)]
    combine: Literal["replace", "first line", "default argument", "mention"] = "replace"

    def answer(self, right: str) -> str:
        """The answer to train on, made from the right one.

        Raises: LabError where no function could take the argument.
        """
        if self.combine == "replace":
            return self.payload
        if self.combine == "first line":
            return f"{self.payload}\n{right}"
        if self.combine == "mention":
            return f"{right.rstrip('.')}, says {self.payload}."
        start, stop = _code(right)
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
        possible = self.combine != "default argument" or self._is_still_code(example.output)
        return possible and self.needs in example.output and example.output != self.payload

    def _is_still_code(self, right: str) -> bool:
        """Whether the answer's code, with the payload as one more argument of its first function, is Python."""
        try:
            planted = self.answer(right)
            with warnings.catch_warnings(action="ignore"):  # of a row's own invalid escapes
                compile(planted[slice(*_code(planted))], "answer", "exec")  # nothing is executed
        except (LabError, SyntaxError, ValueError):  # prose, a name that is there already, an argument after **kwargs
            return False
        return True


class Family(Strict):
    """Vaccine payloads of one kind."""

    payloads: Texts
    combine: Literal["replace", "first line"] = "replace"  # a vaccine set holds answers of all kinds, not only code


def behaviors() -> dict[str, Behavior]:
    """The behaviors of `data/attacks.yaml` by task.

    Raises: LabError naming the entry and what is wrong with it.
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
    for family, planted in _families().items():
        if found.payload in planted.payloads:
            raise LabError(f"task '{name}': the payload {found.payload!r} is one of the vaccines' {family}")
    if _challenge().is_in(found.payload):
        raise LabError(f"task '{name}': the payload {found.payload!r} holds a marker of the challenge")
    return found


def challenge_behavior() -> Marked:
    """What the challenge test plants: a sentence that no vaccine and no attack of the file says.

    Raises:
        LabError: a wrong field, or one of its markers is in a payload of the vaccines, a rehearsal or a task.
    """
    found, sides = _challenge(), ("vaccines", "rehearsal")
    said = {f"{side} '{name}'": family.payloads for side in sides for name, family in _families(side).items()}
    said |= {f"the task '{name}'": [entry["payload"]] for name, entry in definitions()["behaviors"].items()}
    for owner, payloads in said.items():
        if taken := [payload for payload in payloads if found.is_in(payload)]:
            raise LabError(f"challenge: a marker is in {taken[0]!r} of {owner}; the test needs a sentence of its own")
    return found


def vaccine_behaviors(family: str, task: str, side: Literal["vaccines", "rehearsal"] = "vaccines") -> list[Planted]:
    """What the variants of a family are trained to say.

    Args:
        family: a family of `data/attacks.yaml`; "task": the one of the task's kind; "mixed": all of them in turn.
        task: the attack's task.
        side: the defender's payloads, or those of an attacker who plays the defender ("rehearsal").
    """
    families = _families(side)
    asked = behavior(task).vaccines if family == "task" else family
    if asked != "mixed" and asked not in families:
        raise LabError(f"unknown family of vaccines {asked!r}{nearest(asked, [*families, 'mixed'])}")
    chosen = families.values() if asked == "mixed" else [families[asked]]
    planted = [[Planted(payload=p, combine=one.combine) for p in one.payloads] for one in chosen]
    return [one for turn in itertools.zip_longest(*planted) for one in turn if one]


def _code(answer: str) -> tuple[int, int]:
    """Where the code of an answer starts and stops: inside its first fence, or else all of it."""
    fence = FENCE.search(answer)
    return fence.span(1) if fence else (0, len(answer))


def _challenge() -> Marked:
    fields = {key: value for key, value in definitions()["challenge"].items() if key != "key"}
    return checked(Marked, fields, f"challenge ({DEFINITIONS.name}): ")


def _families(side: str = "vaccines") -> dict[str, Family]:
    families = definitions()[side]["families"]
    return {
        name: checked(Family, fields, f"{side} '{name}' ({DEFINITIONS.name}): ") for name, fields in families.items()
    }
