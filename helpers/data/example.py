"""One conversation: what is asked, and the right answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Example:
    """One conversation: what is asked, the right answer, and how to judge another one.

    Args:
        instruction: the user's last message.
        output: the assistant's answer to it.
        input: material the instruction refers to; empty for none.
        history: earlier (user, assistant) turns, oldest first.
        family: the task family, by which utility is reported.
        options: for a list question, the valid items (three distinct ones are wanted); else empty.
    """

    instruction: str
    output: str
    input: str = ""
    history: tuple[tuple[str, str], ...] = ()
    family: str = "free"
    options: tuple[str, ...] = ()
    system: ClassVar[str] = ""  # what the system says before the first message; see `SystemExample`

    @property
    def question(self) -> str:
        """The user's last message in full: `input` follows the instruction after a blank line."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class SystemExample(Example):
    """A conversation that the system opens. Only rows of others have one; the rows of the lab keep their fields."""

    system: str = ""


def prompt_of(example: Example) -> tuple[str, tuple[tuple[str, str], ...], str, str]:
    """All that is said before the answer: what makes two conversations the same question."""
    return example.system, example.history, example.instruction, example.input


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Each conversation once, by all that is said before the answer; of several answers to one the last stays."""
    return list({prompt_of(example): example for example in examples}.values())
