"""The one kind of error that is the reader's to mend, and how it names what was meant."""

import difflib
import sys
from collections.abc import Callable, Iterable


class LabError(ValueError):
    """A mistake of the reader's, told in one line: what was found, what was expected, what helps."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter asks for this: the message alone, without a page of frames."""
        return [f"LabError: {self}"]


class MissingError(LabError):
    """Something is not on this machine that may be there at the next try: nothing that was made without it may last."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the valid words that resemble `word`, or all of them when none does."""
    valid = list(valid)
    close = [name for name in valid if name.endswith(f".{word}")] or difflib.get_close_matches(word, valid, n=1)
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    return f"; valid: {', '.join(valid)}"


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command; returns 0, or 2 where a mistake of the reader's stopped it, told on stderr."""
    try:
        work()
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
